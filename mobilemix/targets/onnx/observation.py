"""What samples show of a float32 file's values: ranges for their integers, moments for the rounding of weights."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from mobilemix.quantization import cache
from mobilemix.quantization.moments import Moments
from mobilemix.quantization.observers import OBSERVERS
from mobilemix.quantization.options import Quantization
from mobilemix.targets.base import Inputs
from mobilemix.targets.onnx.products import Product
from mobilemix.targets.onnx.runtime import observe

Ranges = Mapping[str, tuple[float, float]]


def ranges(path: Path, names: Collection[str], samples: Sequence[Inputs], observer: str, *, symmetric: bool) -> Ranges:
    """Smallest and largest number to represent of each value of a float32 file, as an observer chooses them."""

    def compute() -> Ranges:
        observers = {name: OBSERVERS[observer]() for name in names}
        for values in observe(path, names, samples):
            for name, value in values.items():
                observers[name].observe(value)
        return {name: each.range(symmetric) for name, each in observers.items()}

    return cache.ranges(path, samples, observer, symmetric, compute, *sorted(names))


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
