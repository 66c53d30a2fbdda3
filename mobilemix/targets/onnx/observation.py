"""What samples show of a float32 file's values: ranges for their integers, moments for the rounding of weights."""

import functools
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from mobilemix.quantization import cache
from mobilemix.quantization.affine import from_integers, grid_between, to_integers
from mobilemix.quantization.moments import Moments
from mobilemix.quantization.observers import LEAST_SQNR, OBSERVERS, show
from mobilemix.quantization.options import Quantization
from mobilemix.targets.base import Inputs
from mobilemix.targets.onnx.products import Product
from mobilemix.targets.onnx.runtime import observe

Ranges = Mapping[str, tuple[float, float]]

COMPARED = 32
"""Samples on which values are compared with what 8 bits leave of them."""


def ranges(path: Path, names: Collection[str], samples: Sequence[Inputs], observer: str, *, symmetric: bool) -> Ranges:
    """Smallest and largest number to represent of each value of a float32 file, as an observer chooses them."""
    compute = functools.partial(_observed, path, names, samples, observer, symmetric)
    return cache.ranges(path, samples, observer, symmetric, compute, *sorted(names))


def held_ranges(path: Path, names: Collection[str], samples: Sequence[Inputs], observer: str) -> Ranges:
    """As `ranges`, asymmetric; (0, 0) for values of which 8 bits leave less than `LEAST_SQNR`."""

    def compute() -> Ranges:
        found = _observed(path, names, samples, observer, symmetric=False)
        left = signal_to_noise(path, found, samples)
        return {name: ends if left[name] >= LEAST_SQNR else (0.0, 0.0) for name, ends in found.items()}

    return cache.ranges(path, samples, observer, False, compute, str(LEAST_SQNR), *sorted(names))


def signal_to_noise(path: Path, found: Ranges, samples: Sequence[Inputs]) -> dict[str, float]:
    """In dB, what 8 bits of a range leave of each value, over some of the samples."""
    grids = {name: grid_between(*ends, signed=False, symmetric=False) for name, ends in found.items()}
    signal, noise = (dict.fromkeys(found, 0.0) for _ in range(2))
    for values in observe(path, found, samples[:: -(-len(samples) // COMPARED)]):
        for name, value in values.items():
            rounded = from_integers(to_integers(value, grids[name]), grids[name])
            signal[name] += float(np.square(value, dtype=np.float64).sum())
            noise[name] += float(np.square(rounded - value, dtype=np.float64).sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: float(10 * np.log10(np.float64(signal[name]) / noise[name])) for name in found}


def _observed(path: Path, names: Collection[str], samples: Sequence[Inputs], observer: str, symmetric: bool) -> Ranges:
    observers = {name: OBSERVERS[observer]() for name in names}
    for values in observe(path, names, samples):
        for name, value in values.items():
            show(observers, name, value)
    return {name: each.range(symmetric) for name, each in observers.items()}


def moments(path: Path, products: Sequence[Product], samples: Sequence[Inputs]) -> dict[str, Moments]:
    """Moments of what the weights of each product are multiplied by, by the product's name."""
    found: dict[str, Moments] = {}
    for seed, values in enumerate(observe(path, {str(each.activation.name) for each in products}, samples)):
        for each in products:
            seen = each.moments(values[str(each.activation.name)], seed)
            found[each.name] = found[each.name] + seen if each.name in found else seen
    return found


def layer_moments(
    path: Path, layers: Sequence[Product], samples: Sequence[Inputs], options: Quantization
) -> Mapping[str, Moments]:
    """Of the layers' inputs, by name; none if the options have no use for them."""
    if options.rounding == "nearest" and not options.bias_correction:
        return {}
    return moments(path, [each for each in layers if each.has_rows()], samples)
