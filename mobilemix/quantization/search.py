"""Which layers stay in float: as few, and as cheap ones, as a limit on the lost accuracy allows.

Errors of layers are taken to be independent, so that their energies add up: a layer left in float takes drift² away
and costs what its quantisation would have saved. In the order of drift² for each unit of that, the fewest are looked
for by bisection. Then they are given back in halves, and halves of these, wherever the limit still holds, those first
whose quantisation saves most. Every step is judged by running the mixed model itself.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from mobilemix.errors import InputError, UnknownNameError
from mobilemix.quantization.sensitivity import Layer, Quantizable, Run, Sensitivity, distance
from mobilemix.targets.base import Array, Inputs
from mobilemix.threads import spread

OBJECTIVES = ("latency", "size")
TRIALS = 24
"""Choices after which no more are tried."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One choice of layers, run on all samples.

    Attributes:
        kept: names of the layers in float, in the order of the graph.
        score: see `Judge`.
        drop: of the score, from the float model's.
    """

    kept: tuple[str, ...]
    score: float
    drop: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the search found.

    Attributes:
        chosen: the trial within the limit that saves most.
        trials: all of them, in order; the first has every layer quantised.
    """

    chosen: Trial
    trials: tuple[Trial, ...]


@dataclasses.dataclass(frozen=True)
class Judge:
    """Says how good a model is.

    Attributes:
        samples: inputs.
        labels: the right class of each; None compares with the float model.
        expected: outputs of the float model, [sample][output].
    """

    samples: Sequence[Inputs]
    labels: Sequence[int] | None
    expected: Sequence[Sequence[Array]]

    @classmethod
    def of(cls, reference: Run, samples: Sequence[Inputs], labels: Sequence[int] | None) -> "Judge":
        """A judge by what the float model answers."""
        return cls(samples, labels, [list(answer.values()) for answer in spread(reference, samples)])

    @property
    def measure(self) -> str:
        """What a score is: "top-1", "top-1 agreement" or, of a model that is no classifier, "cosine"."""
        if self.labels is not None:
            return "top-1"
        return "top-1 agreement" if self._classifies else "cosine"

    @property
    def reference(self) -> float:
        """The float model's own score."""
        return self._score(self.expected)

    def score(self, run: Run) -> float:
        """Of a model: from 0 to 1, of right answers, of answers like the float model's, or their mean cosine."""
        return self._score([list(answer.values()) for answer in spread(run, self.samples)])

    @property
    def _classifies(self) -> bool:
        first = self.expected[0][0]
        return first.ndim == 2 and first.shape[0] == 1 and first.shape[1] > 1

    def _score(self, outputs: Sequence[Sequence[Array]]) -> float:
        if self.labels is None and not self._classifies:
            return distance(outputs, self.expected).cosine
        right = self.labels if self.labels is not None else [int(np.argmax(answer[0])) for answer in self.expected]
        answers = [int(np.argmax(answer[0])) for answer in outputs]
        return float(np.mean(np.equal(answers, right)))


def savings(layers: Sequence[Layer], objective: str) -> dict[str, float]:
    """What the quantisation of each layer is worth, by name, in units that only compare with one another.

    Its seconds in float where all are known, else multiply-adds; or the bytes of its weights, for "size".

    Raises:
        UnknownNameError: an objective that is not in `OBJECTIVES`.
    """
    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    if objective == "size":
        return {layer.name: float(layer.weight_bytes) for layer in layers}
    if all(layer.seconds is not None for layer in layers):
        return {layer.name: float(layer.seconds or 0) for layer in layers}
    return {layer.name: float(layer.multiply_adds or 0) for layer in layers}


def order(found: Sequence[Sensitivity], saved: Mapping[str, float]) -> list[str]:
    """Names of the layers, those first whose quantisation does most harm for what it saves."""

    def harm(one: Sensitivity) -> float:
        saving = saved[one.layer.name]
        return one.drift.relative_l2**2 / saving if saving else np.inf

    return [one.layer.name for one in sorted(found, key=harm, reverse=True)]


def search(
    ranked: Sequence[str],
    saved: Mapping[str, float],
    judge: Callable[[Collection[str]], tuple[float, float]],
    max_drop: float,
) -> Choice:
    """The layers to leave in float.

    Args:
        ranked: names of all layers, see `order`.
        saved: see `savings`; in the order of the graph.
        judge: score and drop of the model with these layers in float.
        max_drop: largest drop, from 0 to 1.

    Raises:
        InputError: no choice that quantises anything keeps within it.
    """
    trials: dict[tuple[str, ...], Trial] = {}

    def holds(names: Collection[str]) -> bool:
        kept = tuple(name for name in saved if name in names)
        if kept not in trials:
            trials[kept] = Trial(kept, *judge(kept))
        return trials[kept].drop <= max_drop

    def lost(trial: Trial) -> float:
        return sum(saved[name] for name in trial.kept)

    if not holds(()):
        low, high = 0, len(ranked)  # too few, and enough: the float model itself loses nothing
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(ranked[:middle]) else (middle, high)
        kept = set(ranked[:high])
        groups = [sorted(kept, key=saved.__getitem__)]
        while groups and len(trials) < TRIALS:
            group = groups.pop()
            if holds(kept.difference(group)):
                kept.difference_update(group)
            elif len(group) > 1:
                middle = len(group) // 2
                groups += [group[:middle], group[middle:]]  # those that save most come first
    within = [trial for trial in trials.values() if trial.drop <= max_drop]
    if not within:
        least = min(trial.drop for trial in trials.values())
        raise InputError(f"no choice of layers loses {max_drop:.2%} or less; the best loses {least:.2%}: allow as much")
    return Choice(min(within, key=lost), tuple(trials.values()))


def find(
    subject: Quantizable,
    found: Sequence[Sensitivity],
    judge: Judge,
    objective: str,
    max_drop: float,
    progress: Callable[[str], None],
) -> Choice:
    """`search` on a target's graph; raises as that and `savings` do."""
    saved = savings(subject.layers, objective)
    reference = judge.reference

    def run(kept: Collection[str]) -> tuple[float, float]:
        progress(f"search · {len(kept)} of {len(saved)} layers in float")
        score = judge.score(subject.runner(kept))
        return score, reference - score

    return search(order(found, saved), saved, run, max_drop)
