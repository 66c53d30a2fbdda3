"""What an artifact is worth on a data set: its accuracy, and its agreement with the float model that it was made from.

Intervals are 95%: Wilson's for a share (Wilson 1927), and for a difference of two shares of the same samples that of
Agresti and Min (Statistics in Medicine 24, 2005), half a sample added to each of the four cells.
"""

import dataclasses
import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mobilemix.batches import BATCH, INDEPENDENCE, unstacked
from mobilemix.errors import InputError
from mobilemix.parity import cosine, relative_l2
from mobilemix.preprocess import Preprocess
from mobilemix.progress import counting
from mobilemix.quantization.data import Dataset, Form, fixed_form, open_form
from mobilemix.signature import Input
from mobilemix.targets.base import Array, Inputs, Runner
from mobilemix.threads import spread

NORMAL = 1.959963984540054
"""Standard deviations to either side of the mean that hold 95% of a normal distribution."""
TOP = 5
UNKNOWN = -1
"""Class of a sample that lies in no class folder."""


@dataclasses.dataclass(frozen=True)
class Share:
    """A share of samples, with its 95% interval.

    Attributes:
        count: of the samples that have the property.
        of: all samples that were looked at.
        value: count / of.
        low, high: ends of the interval.
    """

    count: int
    of: int
    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Paired:
    """The artifact and the float model on the same labelled samples.

    Attributes:
        both: samples that both have right.
        artifact_only, float_only: that only the one has right.
        neither: that both have wrong.
        difference: top-1 of the artifact less that of the float model.
        low, high: ends of its 95% interval.
        p: two-sided, of McNemar's exact test: how likely a difference as large is where both are equally good.
    """

    both: int
    artifact_only: int
    float_only: int
    neither: int
    difference: float
    low: float
    high: float
    p: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The artifact on a data set, and the float model beside it. Shares are None where there is nothing to count.

    Attributes:
        samples: that both were run on.
        skipped: files that could not be read.
        classes: of the model; 0 if it is no classifier.
        labelled: where the samples' classes are from: "names" of folders, "order" of folders, or "file"; None without.
        top1, top5: labelled samples whose class is the artifact's first, or among its first five of more than five.
        float_top1, float_top5: the same of the float model.
        paired: how the two compare, sample by sample.
        agreement: samples for which both have the same first class.
        cosine: between the two's outputs, the output where it is smallest, mean over the samples; 0 for outputs that
            are not finite.
        seconds: for one sample of the artifact's, all cores busy with several.
    """

    samples: int
    skipped: int
    classes: int
    labelled: str | None
    top1: Share | None
    top5: Share | None
    float_top1: Share | None
    float_top5: Share | None
    paired: Paired | None
    agreement: Share | None
    cosine: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Truth:
    """The class of each sample of a data set.

    Attributes:
        classes: their indices, `UNKNOWN` for some, (size,).
        known_from: see `Evaluation.labelled`.
    """

    classes: Array
    known_from: str


def form_of_artifact(provenance: Mapping[str, Any], preprocess: Preprocess | None) -> Form:
    """What an artifact takes, by the provenance in its manifest; of an open batch the most frequent size."""
    stated = provenance["inputs"]
    origins = {name: each.get("source", each["dtype"]) for name, each in stated.items()}
    complex_names = frozenset(name for name, dtype in origins.items() if dtype.startswith("complex"))
    batched = {name for name, each in stated.items() if each["shape"][:1] == [BATCH]}
    inputs = [
        Input(
            name,
            tuple(1 if size == BATCH else size for size in each["shape"]),
            each["dtype"] if name in complex_names else origins[name],
        )
        for name, each in stated.items()
    ]
    form = (
        open_form(inputs, batched, preprocess, size=provenance["batch"]["opt"])
        if batched
        else fixed_form(inputs, preprocess)
    )
    return dataclasses.replace(form, complex_names=complex_names)


def truth_of(dataset: Dataset, path: Path, labels: Sequence[str] | None, classes: int) -> Truth | None:
    """The classes of samples in an .npz file with labels, or in a folder with one subfolder for each class.

    Folders are matched with the labels by name, in any case and with underscores for spaces; or, if none of them is
    called as a label, by their order, which has to be of all classes. Names that are numbers are in numeric order.

    Args:
        dataset: what was opened.
        path: from where.
        labels: names of the model's classes, if they are known.
        classes: how many there are; without any nothing is labelled.

    Raises:
        InputError: folders or labels that are not the model's classes.
    """
    if not classes:
        return None
    if dataset.labels is not None:
        if dataset.labels.min() < 0 or dataset.labels.max() >= classes:
            raise InputError(
                f"labels in {path} go from {dataset.labels.min()} to {dataset.labels.max()}; the model has "
                f"{classes} classes, from 0"
            )
        return Truth(dataset.labels, "file")
    if not dataset.files:
        return None
    folders = [each.name for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")]
    if not folders:
        return None
    index, known_from = _match(sorted(folders, key=_in_order), labels or (), classes)
    places = (file.relative_to(path).parts for file in dataset.files)
    return Truth(np.array([index[parts[0]] if len(parts) > 1 else UNKNOWN for parts in places]), known_from)


def _match(folders: Sequence[str], labels: Sequence[str], classes: int) -> tuple[dict[str, int], str]:
    """Class of each folder."""
    known = {_plain(label): number for number, label in enumerate(labels)}
    others = [folder for folder in folders if _plain(folder) not in known]
    if not others:
        return {folder: known[_plain(folder)] for folder in folders}, "names"
    if len(others) == len(folders) == classes:
        return {folder: number for number, folder in enumerate(folders)}, "order"
    some = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
    raise InputError(
        f"no class of the model is called as the folders {some}; name folders as its {classes} classes"
        f"{', such as ' + labels[0] if labels else ''}, or give one for each, or a folder without subfolders"
    )


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").casefold().split())


def _in_order(name: str) -> tuple[int, str]:
    return (int(name) if name.isdecimal() else 0, name)


def measure(
    runner: Runner,
    module: nn.Module,
    dataset: Dataset,
    form: Form,
    outputs: Sequence[str],
    *,
    truth: Truth | None,
    classes: int,
    samples: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Run an artifact and the float32 model that it was made from on samples of a data set.

    Args:
        runner: the artifact.
        module: the model as its author wrote it.
        dataset: the samples.
        form: what the artifact takes.
        outputs: names of the artifact's, in the order of the module's.
        truth: classes of the samples, if they are known.
        classes: of the first output, (batch, classes); 0 if it is none.
        samples: at most so many, spread over all; None for all.
        seed: of their choice.

    Raises:
        InputError: nothing that can be read, or samples that the model does not take.
    """
    source = _Source(module, form)
    right: list[tuple[bool, bool, bool, bool]] = []
    agree: list[bool] = []
    cosines: list[float] = []
    seconds = 0.0
    with counting("sample", dataset.size if samples is None else min(samples, dataset.size)) as step:
        for chunk in dataset.read(samples, seed):
            inputs = [sample for _, sample in chunk]
            start = time.perf_counter()
            answers = _answers(runner, form, outputs, inputs, step)
            seconds += time.perf_counter() - start
            for (number, _), answer, expected in zip(chunk, answers, source(inputs), strict=True):
                cosines.append(min(_cosine(*pair) for pair in zip(answer, expected, strict=True)))
                if not classes:
                    continue
                found, best = _first(answer[0]), _first(expected[0])
                agree.append(found[:1] == best[:1])
                if truth is not None and (true := int(truth.classes[number])) != UNKNOWN:
                    right.append((found[:1] == [true], best[:1] == [true], true in found, true in best))
    top1, float_top1, top5, float_top5 = (
        (_share(column) for column in zip(*right, strict=True)) if right else [None] * 4
    )
    return Evaluation(
        samples=len(cosines),
        skipped=len(dataset.skipped),
        classes=classes,
        labelled=truth.known_from if truth and right else None,
        top1=top1,
        top5=top5 if classes > TOP else None,
        float_top1=float_top1,
        float_top5=float_top5 if classes > TOP else None,
        paired=_paired([pair[:2] for pair in right]) if right else None,
        agreement=_share(agree) if agree else None,
        cosine=float(np.mean(cosines)),
        seconds=seconds / len(cosines),
    )


def _answers(
    runner: Runner, form: Form, names: Sequence[str], samples: Sequence[Inputs], step: Callable[[int], None]
) -> list[list[Array]]:
    """[sample][output] of the artifact."""

    def run(batch: Inputs) -> list[Array]:
        outputs = runner.run(batch)
        step(form.size)
        return [outputs[name] for name in names]

    return _by_sample(spread(run, form.batches(samples)), form, len(samples))


def _by_sample(outputs: Sequence[list[Array]], form: Form, samples: int) -> list[list[Array]]:
    """[batch][output] → [sample][output], without what fills up the last batch."""
    if form.size == 1:
        return list(outputs)
    if any(len(output) != form.size for output in outputs[0]):
        raise InputError("the batch is not the first axis of every output; export the model with a batch of 1")
    return unstacked(outputs)[:samples]


class _Source:
    """The float model as its author wrote it, in float32; many samples at once where that changes no answer."""

    def __init__(self, module: nn.Module, form: Form) -> None:
        self._module, self._form = module, form
        self._together = form.size == 1 and len(form.batched) == len(form.inputs)
        self._tried = False

    def __call__(self, samples: Sequence[Inputs]) -> list[list[Array]]:
        """[sample][output]."""
        if self._together and not self._tried and len(samples) > 1:
            self._together, self._tried = self._is_independent(samples[:2]), True
        if self._together and len(samples) > 1:
            return unstacked([self._run(self._form.stack(samples))])
        return _by_sample([self._run(batch) for batch in self._form.batches(samples)], self._form, len(samples))

    def _is_independent(self, samples: Sequence[Inputs]) -> bool:
        """Whether a batch is answered as its samples are one by one."""
        singles = [self._run(sample) for sample in samples]
        try:
            answered = unstacked([self._run(self._form.stack(samples))])
        except Exception:  # whatever a user's forward raises that was written for a batch of 1
            return False
        pairs = zip(itertools.chain(*answered), itertools.chain(*singles), strict=True)
        return all(
            one.shape == other.shape and relative_l2(one, other) <= INDEPENDENCE["float32"] for one, other in pairs
        )

    def _run(self, batch: Inputs) -> list[Array]:
        tensors = [
            torch.view_as_complex(torch.from_numpy(value))
            if name in self._form.complex_names
            else torch.from_numpy(value)
            for name, value in batch.items()
        ]
        with torch.no_grad():
            leaves = [leaf for leaf in pytree.tree_leaves(self._module(*tensors)) if isinstance(leaf, Tensor)]
        return [(torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf).numpy() for leaf in leaves]


def _first(output: Array) -> list[int]:
    """The `TOP` classes of the largest numbers of (1, classes), in that order; none where one is not finite."""
    row = np.ravel(output)
    return [int(each) for each in np.argsort(-row, kind="stable")[:TOP]] if np.isfinite(row).all() else []


def _cosine(one: Array, other: Array) -> float:
    value = cosine(one, other)
    return value if math.isfinite(value) else 0.0


def _share(hits: Sequence[bool]) -> Share:
    """Share of samples, with Wilson's score interval."""
    count, of = sum(hits), len(hits)
    value, spread_ = count / of, NORMAL**2 / of
    centre = (value + spread_ / 2) / (1 + spread_)
    half = math.sqrt(spread_ * (value * (1 - value) + spread_ / 4)) / (1 + spread_)
    return Share(count, of, value, max(0.0, centre - half), min(1.0, centre + half))


def _paired(right: Sequence[tuple[bool, bool]]) -> Paired:
    """Compare which samples the artifact and the float model have right."""
    cells = Counter(right)
    first, second, of = cells[True, False], cells[False, True], len(right)
    centre, total = (first - second) / (of + 2), of + 2
    half = NORMAL * math.sqrt((first + second + 1) / total - centre**2) / math.sqrt(total)
    return Paired(
        both=cells[True, True],
        artifact_only=first,
        float_only=second,
        neither=cells[False, False],
        difference=(first - second) / of,
        low=centre - half,
        high=centre + half,
        p=_mcnemar(first, second),
    )


def _mcnemar(one: int, other: int) -> float:
    """Two-sided p of McNemar's exact test for two numbers of discordant samples: a fair coin's."""
    discordant = one + other
    tail = sum(math.comb(discordant, count) for count in range(min(one, other) + 1))
    return min(1.0, 2 * tail / (1 << discordant))
