"""What a recipe does to a float package: which weights are compressed to what, and which values are rounded.

Values are rounded to 8 bits with one scale and one zero point for each, in front of the layers that read them: the
pairs of `quantize` and `dequantize` that coremltools' `linear_quantize_activations` writes, but for three things. It
runs the package for its statistics, which needs a Mac, and keeps those of the last sample; here the package is executed
by mobilemix, and all samples count. It also rounds spectra, the values of depthwise convolutions and what residual sums
add, which makes the error of the trained flowers classifier's logits three times as large (5.3 % for 1.8 %), and what
layers compute in front of their activations. And it writes a value's pair once for each reader.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from mobilemix.errors import InputError
from mobilemix.quantization import cache
from mobilemix.quantization.affine import Grid, grid_between
from mobilemix.quantization.data import calibration
from mobilemix.quantization.drift import MOST, Drift, unheld
from mobilemix.quantization.options import FLOAT, check_patterns, precision_of
from mobilemix.recipe import Recipe
from mobilemix.targets.base import LARGEST_HALF, Inputs, Lowered, Runner
from mobilemix.targets.coreml.audit import SMALLEST_NORMAL
from mobilemix.targets.coreml.calibrate import moments_of, observed
from mobilemix.targets.coreml.layers import Layer, layers
from mobilemix.targets.coreml.package import Package
from mobilemix.targets.coreml.weights import PALETTES, Form, compress, half_up

LEAST_IOS: Mapping[str, int] = {"int8": 17, "w8": 16, "w4": 18, **dict.fromkeys(PALETTES, 16)}
"""Oldest iOS that reads each precision; these are the precisions that compress."""

OBSERVER = "percentile"
"""Of values, where the recipe names no other."""


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A value in 8 bits.

    Attributes:
        grid: with a scale that float16 holds.
        readers: names of the first outputs of the operations that read the rounded value; others read it as it is.
    """

    grid: Grid
    readers: frozenset[str]


class Observable(Runner, Protocol):
    """A float package that can be executed with some of its values rounded."""

    def drifts(self, values: Mapping[str, Rounded], samples: Sequence[Inputs]) -> dict[str, Drift]:
        """What the rounding of each value does; see `mobilemix.quantization.drift.drifts`."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is changed in a float package.

    Attributes:
        weights: by the constant's name.
        values: by name.
    """

    weights: Mapping[str, Form]
    values: Mapping[str, Rounded]


def check_options(recipe: Recipe) -> None:
    """Refuse iOS versions that cannot read a precision.

    Raises:
        InputError: the recipe's is one.
    """
    used = {str(recipe.precision), *(precision for _, precision in recipe.quantization.layers)} - {FLOAT}
    for precision in sorted(used):
        if recipe.minimum_ios < LEAST_IOS[precision]:
            raise InputError(
                f"{precision} needs iOS {LEAST_IOS[precision]}, not {recipe.minimum_ios}; "
                f"use --minimum-ios {LEAST_IOS[precision]}"
            )


def planned(package: Package, lowered: Lowered, recipe: Recipe, runner: Observable) -> Plan:
    """Choose the form of every weight, and observe what is to be rounded.

    Args:
        package: float, as it will be but for what is planned.
        lowered: what it was converted from.
        recipe: its precision, and its options where they concern layers.
        runner: of the package.

    Raises:
        InputError: nothing to compress, or no data to calibrate on.
        UnknownNameError: a pattern of the options that no layer has.
    """
    chosen = choose(layers(package, lowered), recipe)
    samples = functools.cache(lambda: calibration(lowered, recipe.quantization))
    constants = {each.outputs[0].name: each.attributes["val"] for each in package.operations if each.type == "const"}
    moments = {}
    if recipe.quantization.rounding == "adaround":
        rounded = [layer for layer, precision in chosen if precision not in (FLOAT, *PALETTES)]
        moments = moments_of(rounded, runner, constants, samples())
    weights = {
        name: compress(constants[name].array.astype(np.float32), precision, recipe.minimum_ios, moments.get(layer.name))
        for name, (layer, precision) in by_weight(chosen).items()
    }
    return Plan(weights, rounded_values(package, chosen, recipe, runner, samples))


def by_weight(chosen: Sequence[tuple[Layer, str]]) -> dict[str, tuple[Layer, str]]:
    """The first reader of each weight that is compressed, and its precision, by the name of the constant.

    A weight that layers of several precisions share has none of them.
    """
    readers: dict[str, dict[str, Layer]] = defaultdict(dict)
    for layer, precision in chosen:
        readers[layer.weight].setdefault(precision, layer)
    return {
        name: (layer, precision)
        for name, by_precision in readers.items()
        for precision, layer in by_precision.items()
        if precision != FLOAT and len(by_precision) == 1
    }


def choose(found: Sequence[Layer], recipe: Recipe) -> list[tuple[Layer, str]]:
    """Every layer with its precision.

    Raises:
        UnknownNameError: a pattern of the options that no layer has.
        InputError: every layer stays in float.
    """
    options = recipe.quantization
    check_patterns(options, ((layer.name, layer.module) for layer in found))
    chosen = [(layer, precision_of(options, str(recipe.precision), layer.name, layer.module)) for layer in found]
    if all(precision == FLOAT for _, precision in chosen):
        raise InputError("no layer is left to compress: there is none, or all stay in float; use --precision fp16")
    return chosen


def rounded_values(
    package: Package,
    chosen: Sequence[tuple[Layer, str]],
    recipe: Recipe,
    runner: Observable,
    samples: Callable[[], list[Inputs]],
) -> dict[str, Rounded]:
    """What int8 layers read, by name, in 8 bits of the range that samples show; see `planned`.

    Values that 8 bits do not hold are not among them; see `mobilemix.quantization.drift.unheld`.
    """
    readers: dict[str, set[str]] = defaultdict(set)
    for layer, precision in chosen:
        if precision == "int8" and layer.value is not None:
            readers[layer.value].add(layer.operation.outputs[0].name)
    if not readers:
        return {}
    observer = recipe.quantization.observer or OBSERVER

    def held() -> dict[str, tuple[float, float]]:
        found = observed(runner, readers, samples(), observer)
        lost = unheld(runner.drifts(_rounded(found, readers), samples()), MOST)
        return {name: (0.0, 0.0) if name in lost else ends for name, ends in found.items()}

    names = (f"{name} {' '.join(sorted(each))}" for name, each in readers.items())
    ranges = cache.ranges(package.path, samples(), observer, False, held, str(MOST), *sorted(names))
    return _rounded(ranges, readers)


def _rounded(ranges: Mapping[str, tuple[float, float]], readers: Mapping[str, set[str]]) -> dict[str, Rounded]:
    """Those of the values whose range is one."""
    grids = {name: _grid(*ranges[name]) for name in readers}
    return {name: Rounded(grid, frozenset(readers[name])) for name, grid in grids.items() if grid is not None}


def _grid(low: float, high: float) -> Grid | None:
    """Int8 with a zero point and a scale of float16; None where float16 has no normal number for the scale."""
    grid = grid_between(low, high, symmetric=False)
    scale = half_up(grid.scale).astype(np.float32)
    usable = low < high and SMALLEST_NORMAL <= scale <= LARGEST_HALF
    return dataclasses.replace(grid, scale=scale) if usable else None
