"""What a float package computes on typical inputs: the statistics for which coremltools itself needs a Mac."""

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import torch

from mobilemix.progress import counting
from mobilemix.quantization import moments
from mobilemix.quantization.moments import Moments
from mobilemix.quantization.observers import OBSERVERS, show
from mobilemix.targets.base import Array, Inputs, Runner
from mobilemix.targets.coreml.layers import Layer
from mobilemix.targets.coreml.mil_ops.convolution import paddings
from mobilemix.targets.coreml.package import Constant, Operation
from mobilemix.threads import spread

AT_ONCE = 8
"""Samples whose values are held at a time."""


def observed(
    runner: Runner, names: Collection[str], samples: Sequence[Inputs], observer: str
) -> dict[str, tuple[float, float]]:
    """Ranges of the values with these names, over all samples in their order."""
    observers = {name: OBSERVERS[observer]() for name in names}
    for shown in _shown(runner, names, samples):

        def observe(name: str, shown: Sequence[Mapping[str, Array]] = shown) -> None:
            for values in shown:
                show(observers, name, values[name])

        spread(observe, list(names))
    return {name: each.range(symmetric=False) for name, each in observers.items()}


def moments_of(
    layers: Sequence[Layer], runner: Runner, constants: Mapping[str, Constant], samples: Sequence[Inputs]
) -> dict[str, Moments]:
    """Of what the layers read, by their names; `constants` are the package's."""
    read = {layer.name: _read(layer.operation, constants) for layer in layers}
    found: dict[str, Moments] = {}
    seeds = itertools.count()
    for shown in _shown(runner, set(read.values()), samples):
        seeded = [(next(seeds), each) for each in shown]

        def add(layer: Layer, seeded: Sequence[tuple[int, Mapping[str, Array]]] = seeded) -> None:
            for seed, values in seeded:
                one = _moments(layer, values[read[layer.name]], constants, seed)
                found[layer.name] = found[layer.name] + one if layer.name in found else one

        spread(add, layers)
    return found


def _read(operation: Operation, constants: Mapping[str, Constant]) -> str:
    """The value that a layer multiplies by its weights."""
    return next(name for name in operation.inputs["x"] if isinstance(name, str) and name not in constants)


def _moments(layer: Layer, x: Array, constants: Mapping[str, Constant], seed: int) -> Moments:
    if layer.operation.type == "linear":
        return moments.of_matmul(x, seed=seed)
    given = {
        name: constants[argument[0]].array
        for name, argument in layer.operation.inputs.items()
        if isinstance(argument[0], str) and argument[0] in constants
    }
    kernel = layer.shape[2:]
    one = np.ones(len(kernel), np.int64)
    strides, dilations = (given.get(name, one).tolist() for name in ("strides", "dilations"))
    windows = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    pad = torch.tensor(given["pad"]) if "pad" in given else None
    pads = paddings(str(given.get("pad_type", "valid")), pad, x.shape[2:], windows, strides)
    before_then_after = [side for sides in zip(*pads, strict=True) for side in sides]
    return moments.of_conv(x, kernel, strides, before_then_after, dilations, int(given.get("groups", 1)), seed=seed)


def _shown(runner: Runner, names: Collection[str], samples: Sequence[Inputs]) -> Iterator[list[dict[str, Array]]]:
    """The values with these names, some samples at a time."""

    def values(sample: Inputs) -> dict[str, Array]:
        inputs = {name: value for name, value in sample.items() if name in names}
        return inputs | {name: value for name, value in runner.values(sample) if name in names}

    with counting("calibration sample", len(samples)) as step:
        for start in range(0, len(samples), AT_ONCE):
            shown = spread(values, samples[start : start + AT_ONCE])
            yield shown
            step(len(shown))
