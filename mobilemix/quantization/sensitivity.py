"""What quantising one layer costs, all others in float: the noise in its own output, and the drift of the model's."""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import numpy as np

from mobilemix.parity import cosine
from mobilemix.targets.base import Array, Inputs
from mobilemix.threads import spread

EXACT = 200.0
"""Largest SQNR that is stated, in dB: beyond what float32 can tell apart."""

WATCHED = 8
"""Samples of which the layers' own outputs are kept, all layers' at once; the model's outputs are compared on all."""

Run = Callable[[Inputs], Mapping[str, Array]]
"""A model: its outputs, in their order, and values that were asked for, by name, float32. Threads may share it."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """What can be quantised or left in float by itself.

    Attributes:
        name: "module/value", as patterns of `Quantization.layers` name it.
        module: path of the module that it is from.
        output: name of the value that it computes in the target's float graph.
        multiply_adds: for one sample; None where they are not known.
        weight_bytes: of its weights in float32.
        seconds: that it takes in float; None where no runtime here tells.
    """

    name: str
    module: str
    output: str
    multiply_adds: int | None
    weight_bytes: int
    seconds: float | None = None


class Quantizable(Protocol):
    """A target's float graph, of which any choice of layers can be quantised and run."""

    layers: Sequence[Layer]
    """Those that the recipe quantises, in the order of the graph."""
    measured: int
    """Samples, at most, on which there is time to quantise each of them alone."""

    def reference(self, watched: Sequence[str] = ()) -> Run:
        """The float32 graph, which also returns the values with these names."""

    def runner(self, float_layers: Collection[str], watched: Sequence[str] = ()) -> Run:
        """The graph with all layers quantised but those with these names; `watched` as of `reference`."""


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far outputs are from those of the float model, over all samples.

    Attributes:
        relative_l2: ‖difference‖ / ‖float outputs‖, of all samples as one vector.
        cosine: mean over the samples.
        top1: share of the samples whose largest element of the first output is the same.
    """

    relative_l2: float
    cosine: float
    top1: float


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What the quantisation of one layer costs, with every other layer in float.

    Attributes:
        layer: which.
        sqnr: power of its output over the power of the error in it, in dB, at most `EXACT`; of `WATCHED` samples.
        drift: of the model's outputs.
    """

    layer: Layer
    sqnr: float
    drift: Distance


def sensitivities(
    subject: Quantizable, samples: Sequence[Inputs], progress: Callable[[str], None]
) -> list[Sensitivity]:
    """Quantise one layer after another, alone.

    Args:
        subject: the layers and the runners of their choices.
        samples: inputs to compare on.
        progress: told which layer of how many is measured.
    """
    names = [layer.name for layer in subject.layers]
    watched = [layer.output for layer in subject.layers]
    few = range(0, len(samples), -(-len(samples) // WATCHED))
    seen = spread(subject.reference(watched), [samples[index] for index in few])
    answers = spread(subject.reference(), samples)
    expected = [list(answer.values()) for answer in answers]
    count = itertools.count(1)

    def measure(layer: Layer) -> Sensitivity:
        progress(f"sensitivity {next(count)}/{len(names)} · {layer.name}")
        run = subject.runner([name for name in names if name != layer.name], [layer.output])
        outputs, values = [], []
        for index, sample in enumerate(samples):
            found = run(sample)
            outputs.append([found[name] for name in answers[index]])
            if index in few:
                values.append(found[layer.output])
        return Sensitivity(layer, sqnr(values, [each[layer.output] for each in seen]), distance(outputs, expected))

    return spread(measure, subject.layers)


def sqnr(values: Sequence[Array], expected: Sequence[Array]) -> float:
    """Signal to quantisation noise, 10 log₁₀ Σ expected² / Σ (values − expected)², in dB, at most `EXACT`."""
    noise = sum(_energy(value - reference) for value, reference in zip(values, expected, strict=True))
    signal = sum(map(_energy, expected))
    if noise <= signal * 10 ** (-EXACT / 10):
        return EXACT
    return float(10 * np.log10(max(signal, np.finfo(np.float64).tiny) / noise))


def distance(outputs: Sequence[Sequence[Array]], expected: Sequence[Sequence[Array]]) -> Distance:
    """Distance of [sample][output] arrays from the float model's."""
    pairs = [pair for sample in zip(outputs, expected, strict=True) for pair in zip(*sample, strict=True)]
    difference = sum(_energy(one - other) for one, other in pairs)
    norm = sum(_energy(other) for _, other in pairs)
    return Distance(
        relative_l2=float(np.sqrt(difference / norm if norm else difference)),
        cosine=float(np.mean([cosine(one, other) for one, other in pairs])),
        top1=float(np.mean([_first(one) == _first(other) for one, other in zip(outputs, expected, strict=True)])),
    )


def _first(outputs: Sequence[Array]) -> int:
    return int(np.argmax(outputs[0]))


def _energy(array: Array) -> float:
    return float(np.square(array, dtype=np.float64).sum())
