"""What samples show of a float32 file's values: ranges for their integers, moments for the rounding of weights."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import onnx_ir as ir
import torch

from mobilemix.quantization import cache
from mobilemix.quantization.drift import MOST, drifts, unheld
from mobilemix.quantization.moments import Moments
from mobilemix.quantization.observers import OBSERVERS, show
from mobilemix.quantization.options import Quantization
from mobilemix.targets.base import Inputs
from mobilemix.targets.onnx.pairs import DEQUANTISED, OWN, SCALE
from mobilemix.targets.onnx.products import Product
from mobilemix.targets.onnx.rewrites.constants import constant
from mobilemix.targets.onnx.runtime import observe
from mobilemix.targets.onnx.torch_graph import simulate_graph

Ranges = Mapping[str, tuple[float, float]]


def ranges(path: Path, names: Collection[str], samples: Sequence[Inputs], observer: str, *, symmetric: bool) -> Ranges:
    """Smallest and largest number to represent of each value of a float32 file, as an observer chooses them."""
    compute = functools.partial(_observed, path, names, samples, observer, symmetric)
    return cache.ranges(path, samples, observer, symmetric, compute, *sorted(names))


def held(
    path: Path,
    found: Ranges,
    samples: Sequence[Inputs],
    insert: Callable[[ir.Model, Ranges], None],
    *key: str,
) -> Ranges:
    """Ranges, (0, 0) for the values that are to stay in float, see `mobilemix.quantization.drift.unheld`.

    Args:
        path: float32 file.
        found: range of each value that may be rounded, by name.
        samples: typical inputs.
        insert: rounds them to these ranges, in a model in memory; scales have the names that `Pairs` gives them.
        key: what `insert` does besides depends on this.
    """

    def compute() -> Ranges:
        model = ir.load(path)
        weights = {
            str(name): torch.from_numpy(constant(each).copy()) for name, each in model.graph.initializers.items()
        }
        insert(model, found)
        exact = {}  # a layer that its rounded weights spoil would say nothing of its values
        for node in model.graph:
            name = str(node.outputs[0].name)
            plain = name.removesuffix(DEQUANTISED).partition(OWN)[0]
            if node.op_type == "DequantizeLinear" and plain in weights:
                exact[name] = weights[plain].reshape(tuple(map(int, node.outputs[0].shape or ())))
        simulation = simulate_graph(ir.to_proto(model).graph, torch.float32)
        moved = drifts(functools.partial(simulation.probed, given=exact), samples)
        lost = unheld({name.removesuffix(SCALE).partition(OWN)[0]: drift for name, drift in moved.items()}, MOST)
        return {name: (0.0, 0.0) if name in lost else ends for name, ends in found.items()}

    return cache.ranges(path, samples, "held", False, compute, str(MOST), *key, str(sorted(found.items())))


def lost_of(seen: Ranges) -> frozenset[str]:
    """Names of the values that stay in float, because 8 bits do not hold them; see `held`."""
    return frozenset(name for name, (low, high) in seen.items() if not low < high)


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
