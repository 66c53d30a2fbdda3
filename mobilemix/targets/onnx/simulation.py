"""What a quantised file means, in PyTorch, against what ONNX Runtime makes of it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from mobilemix.parity import TIERS, relative_l2
from mobilemix.targets.base import Array, Check, Inputs
from mobilemix.targets.onnx.runtime import OnnxRunner, observe, read_model
from mobilemix.targets.onnx.torch_graph import simulate

_ROUNDINGS = ("QuantizeLinear", "DynamicQuantizeLinear")

TIE = 0.15
"""By how much of a step an integer may be further from its number than half a step. Kernels that add in float32 round a
number near a tie to either side: on the four families in ONNX Runtime 1.32 by 0.001, by 0.1 in its integer softmax."""

SCALE_TOLERANCE = 1e-5
"""Largest relative distance between a scale that the runtime finds and the simulation's."""

FOLLOWED_TOLERANCE = 1e-5
"""Largest relative L2 distance of outputs where the simulation goes on with the runtime's own integers."""


def simulated(path: Path, precision: str, samples: Sequence[Inputs]) -> Check:
    """ONNX Runtime's kernels round as the file says, and what the file dequantises is what it quantised.

    A number near a tie may be rounded to either side, which makes all numbers after it others. So the simulation goes
    on with the runtime's own integers after each rounding: an error is seen where it is made, and nowhere else. The
    runtime computes products with dequantised weights in float32 for this; only at the end does it round as it likes.

    Args:
        path: a quantised file.
        precision: its tier is for what the numbers rounded to other sides may add up to.
        samples: inputs like those that the file is calibrated on.
    """
    simulation, runner, graph = simulate(path), OnnxRunner(path), read_model(path).graph
    weights = {tensor.name for tensor in graph.initializer}
    roundings = [node for node in graph.node if node.op_type in _ROUNDINGS and node.input[0] not in weights]
    integers = [name for node in roundings for name in node.output]
    kept = {name for node in roundings for name in (*node.input, *node.output)}
    names = [*integers, *simulation.outputs]
    faults, count, furthest, followed, drift = list(_mismatches(graph)), 0, 0.0, 0.0, 0.0
    for sample, found in zip(samples, observe(path, names, samples, optimised=bool(roundings)), strict=True):
        outputs, expected = simulation.follow(sample, {name: found[name] for name in integers}, kept)
        for node in roundings:
            distance = _distance(node, expected, found)
            if not distance <= 0.5 + TIE:
                faults.append(f"{node.output[0]} is {distance:.1f} steps from what it is rounded from")
            count, furthest = count + found[node.output[0]].size, max(furthest, distance)
        shipped, free = runner.run(sample), simulation.run(sample)
        followed = max(followed, *(relative_l2(found[name], value) for name, value in outputs.items()))
        drift = max(drift, *(relative_l2(shipped[name], value) for name, value in free.items()))
    rounded = f"{count} integers, the furthest {furthest:.3f} steps from its number; " if count else ""
    detail = f"{rounded}outputs {followed:.0e} of {FOLLOWED_TOLERANCE:.0e}, {drift:.0e} as the runtime itself rounds"
    passed = not faults and followed <= FOLLOWED_TOLERANCE and drift <= TIERS[precision].relative_l2
    return Check("simulated in PyTorch", passed, faults[0] if faults else detail)


def _distance(node: onnx.NodeProto, expected: Mapping[str, Array], found: Mapping[str, Array]) -> float:
    """Largest distance of the runtime's integers from what the simulation rounds, in steps.

    Where the runtime finds the range itself, infinite if its scale is not the simulation's.
    """
    integers = node.output[0]
    if len(node.output) == 1:
        scale, *zero_point = (expected[name] for name in node.input[1:])
    else:
        scale, *zero_point = (found[name] for name in node.output[1:])
        if not abs(scale / expected[node.output[1]] - 1) <= SCALE_TOLERANCE:
            return math.inf
    ends = np.iinfo(expected[integers].dtype)
    numbers = expected[node.input[0]] / scale + sum(each.astype(np.float64) for each in zero_point)
    return float(np.abs(np.clip(numbers, ends.min, ends.max) - found[integers]).max(initial=0))


def _mismatches(graph: onnx.GraphProto) -> Iterator[str]:
    """What is dequantised with another scale or zero point than it is quantised with."""
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in makers:
            grids = zip(makers[node.input[0]].input[1:], node.input[1:], strict=False)
            # One number, or the same for each channel.
            if not all(one == other or np.all(weights[one] == weights[other]) for one, other in grids):
                yield f"{node.output[0]} has another scale or zero point than {node.input[0]}"
