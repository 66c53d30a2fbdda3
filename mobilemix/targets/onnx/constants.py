"""Integers in an ONNX file that stand for weights, and the numbers that they come to."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from mobilemix.targets.base import Array

SHAPE = ".shape"
"""What the name of a shape ends in that blocks of weights are put into."""

SLACK = 1e-4
"""Relative, of comparisons with half a step: what float32 and float16 scales leave."""
_FLOAT8 = 2.0**-4, 2.0**-10
"""Half of the distance between two 8-bit floats: relative to them, and of the smallest in scales."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A weight that is held in few bits.

    Attributes:
        name: of the value that nodes read.
        integers: or 8-bit floats, of the type in the file.
        numbers: what they come to, float64.
        steps: distance between two of them, at each number.
    """

    name: str
    integers: Array
    numbers: Array
    steps: Array

    def fault(self, weight: Array, rounded_to: float) -> str | None:
        """Why these are not the numbers of a weight, each within `rounded_to` steps of it, None if they are."""
        if weight.size != self.numbers.size:
            return f"{self.numbers.size} numbers for {weight.size}"
        exact = weight.astype(np.float64).reshape(self.numbers.shape)
        bound = rounded_to * self.steps
        if self.integers.dtype.name.startswith("float8"):
            relative, least = _FLOAT8
            bound = np.maximum(np.abs(exact) * relative, least * self.steps)
        error = np.abs(self.numbers - exact)
        if not np.all(error <= bound * (1 + SLACK) + SLACK * self.steps):
            return f"off by {float((error / self.steps).max()):.2f} steps"
        return None


_RULES: Mapping[str, Callable[..., Array]] = {
    "Cast": lambda x, **_: x.astype(np.float64),
    "Mul": lambda x, y: x.astype(np.float64) * y,
    "Reshape": lambda x, shape: x.reshape(shape),
}


def stored_constants(model: onnx.ModelProto) -> Iterator[Stored]:
    """Every weight of a file that nodes compute from integers in it: by DequantizeLinear, or by Cast and Mul."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    held: dict[str, Array] = {}  # by what they have become so far
    readers = [node for node in model.graph.node if node.input and node.op_type in (*_RULES, "DequantizeLinear")]
    numbers, ones, zeros = {}, {}, {}
    for node in readers:
        first, *others = node.input
        if not all(name in constants for name in others):
            continue
        if first in constants and constants[first].dtype.kind != "f":
            held[first] = constants[first]
            numbers[first], ones[first], zeros[first] = (
                constants[first].astype(np.float64),
                np.ones(constants[first].shape),
                np.zeros(constants[first].shape),
            )
        if first not in held:
            continue
        (output,) = node.output
        held[output] = held[first]
        for found in (numbers, ones, zeros):
            found[output] = _computed(node, found[first], [constants[name] for name in others])
    read = {name for node in model.graph.node if node.output[0] not in held for name in node.input}
    for name in held.keys() & read:
        if name in numbers and name not in constants:
            yield Stored(name, held[name], numbers[name], np.abs(ones[name] - zeros[name]))


def _computed(node: onnx.NodeProto, content: Array, others: list[Array]) -> Array:
    if node.op_type != "DequantizeLinear":
        return _RULES[node.op_type](content, *others)
    attributes = {each.name: each.i for each in node.attribute}
    axis = attributes.get("axis", 1)
    scale, zero = (each.astype(np.float64) for each in (*others, np.zeros(()))[:2])
    if others[0].ndim == 1:
        shape = [-1 if other == axis else 1 for other in range(content.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape) if zero.ndim else zero
    result: Array = (content - zero) * scale
    return result
