"""Quantised graphs: QuantizeLinear and DequantizeLinear pairs, which TensorRT makes 8-bit kernels of.

What is quantised are the inputs of convolutions and of matrix products with constant weights: activations with one
scale for each tensor, weights with one for each output channel, all symmetric about zero, as TensorRT demands. Biases
are not: kernels add them to wide sums. Outputs are not either: TensorRT fuses the quantisation of the next layer's
input into the kernel where it can. This is what NVIDIA advises
(https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html).

What stays in floating point, and why:

- depthwise convolutions: a few multiply-adds for each number that they read, which tensor cores have no use for, and
  one scale for channels that no weights mix: on the trained flowers classifier, a third of int8's error;
- softmax, norms, means and gates: few multiply-adds, and ranges that 8 bits do not hold;
- products of two activations, such as attention's scores and what a state-space mixer writes and reads: neither side
  has channels that could have scales of their own;
- DFT matrices: the first coefficient of a spectrum is larger than most by a factor of the image's side, so that one
  scale for all leaves few steps to the others: on the trained flowers classifier, a third more error;
- recurrences of scans: an error in a state stays in all later ones;
- what reads one of these before a norm or a residual sum: few of its numbers are much larger than the others;
- sums of residual branches, which go on in floating point to norms and further sums.

What stays is float16: with float32 around the 8-bit products the trained flowers classifier answers no better.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from mobilemix.errors import InputError
from mobilemix.passes.editing import WIDE
from mobilemix.recipe import LEAST_OPSETS
from mobilemix.targets.base import Array, Inputs
from mobilemix.targets.onnx.half import halve, to_half
from mobilemix.targets.onnx.rewrites.constants import constant
from mobilemix.targets.onnx.runtime import observe

Kind = Literal["int8", "fp8"]

_MOVEMENTS = ("Concat", "Expand", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
_NORMS = ("InstanceNormalization", "LayerNormalization", "GroupNormalization")

EXACT = ("dft_", "ssd_mask")
"""What the names of matrices begin with that passes made: of Fourier transforms, and those that sum decays of scans."""

QUANTISED, DEQUANTISED, SCALE = ".quantised", ".dequantised", ".scale"
"""What the names of a value's other forms, and of its scale, end in."""

_TYPES: Mapping[str, ir.DataType] = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
SAMPLED = 20_000
"""Numbers of a value that are looked at in one sample."""

_MAGNITUDES = np.arange(np.float16(np.inf).view(np.uint16), dtype=np.uint16).view(np.float16).astype(np.float64)
"""What float16 tells apart: the bins of histograms."""

SHARES = tuple(share / 20 for share in range(6, 21))
"""Of the largest magnitude, the ranges that are tried."""

_LARGEST = {"int8": 127.0, "fp8": 448.0}
"""Largest magnitude of each type; −128 would make the range of int8 asymmetric."""


def quantize(source: Path, destination: Path, samples: Sequence[Inputs], kind: Kind) -> None:
    """Write a float32 file again with 8-bit products, and float16 around them.

    Before:   x → Conv(w, b) → y
    After:    x → Cast → QuantizeLinear → DequantizeLinear → Conv(DequantizeLinear(w.quantised), b.half) → Cast → y

    Args:
        source: ONNX, float32, opset 19 or newer.
        destination: where to write.
        samples: typical inputs; see `ranges`.
        kind: int8, or 8-bit floats of 4 bits of exponent and 3 of significand ("fp8", E4M3).

    Raises:
        InputError: the opset is older, or there is nothing to quantise.
    """
    model = ir.load(source)
    least = LEAST_OPSETS[kind]
    if model.opset_imports[""] < least:
        raise InputError(
            f"{kind} with float16 scales needs opset {least}, {source.name} has {model.opset_imports['']}; "
            f"export with --opset {least} or newer"
        )
    names = {str(activation.name) for _, activation, _, _ in products(model.graph)}
    if not names:
        raise InputError(f"{source.name} has no convolution or product with constant weights to quantise; use fp16")
    nodes = list(model.graph)
    insert(model, ranges(source, names, samples, kind), kind)
    halve(model)
    _name(model.graph, nodes)
    ir.save(model, destination)


def products(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, ir.Value, int]]:
    """Nodes to quantise, each with its activation, its weight, and the weight's axis of output channels."""
    attention: set[ir.Value] = set()  # softmaxes, wherever they are moved
    heavy: set[ir.Value] = set()  # values with few numbers that are much larger than the others
    for node in graph:
        computed = [value for value in node.inputs if value is not None and not value.is_initializer()]
        if node.op_type == "Softmax" or (node.op_type in _MOVEMENTS and attention.issuperset(computed)):
            attention.update(node.outputs)
        elif node.op_type == "MatMul" and len(computed) == 2:
            if attention.isdisjoint(computed):
                heavy.update(node.outputs)
        elif (found := _operands(node)) is not None:
            activation, weight, axis = found
            if str(weight.name).startswith(EXACT) or str(node.outputs[0].name).startswith(WIDE) or activation in heavy:
                heavy.update(node.outputs)
            else:
                yield node, activation, weight, axis
        elif computed and heavy.issuperset(computed) and node.op_type not in _NORMS:
            heavy.update(node.outputs)


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value, int] | None:
    """Activation, weight, and the weight's axis of output channels of a product with constant weights, else None.

    Depthwise convolutions are none: their sums are over pixels.
    """
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    first, second = node.inputs[:2]
    assert first is not None
    assert second is not None
    if second.is_initializer() and len(second.shape) > 1 and not first.is_initializer():
        if node.op_type == "Conv":
            depthwise = second.shape[1] == 1 and node.attributes.get_int("group", 1) > 1
            return None if depthwise else (first, second, 0)
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0)
        return first, second, len(second.shape) - (2 if transposed else 1)
    if node.op_type == "MatMul" and first.is_initializer() and len(first.shape) > 1:
        return second, first, len(first.shape) - 2
    return None


def ranges(path: Path, names: Collection[str], samples: Sequence[Inputs], kind: Kind) -> dict[str, float]:
    """Largest magnitude to represent of each value of a float32 file: in int8 the one of least squared error.

    The few numbers beyond it are clipped, so that the others have finer steps: on the trained flowers classifier that
    takes a third of the error away. The steps of an 8-bit float are finer for smaller numbers as it is, and its range
    is the largest magnitude of all samples.
    """
    largest = dict.fromkeys(names, 0.0)
    counts = {name: np.zeros(len(_MAGNITUDES), np.int64) for name in names}
    for values in observe(path, names, samples):
        for name, value in values.items():
            magnitudes = np.abs(value).ravel()
            largest[name] = max(largest[name], float(magnitudes.max(initial=0)))
            some = magnitudes[:: magnitudes.size // SAMPLED | 1]  # odd, so that no column of an image is left out
            counts[name] += np.bincount(to_half(some).view(np.uint16), minlength=len(_MAGNITUDES))
    if kind == "fp8":
        return largest
    return {name: peak * _share(counts[name], peak) for name, peak in largest.items()}


def _share(counts: Array, largest: float) -> float:
    """Of the largest magnitude, the range at which int8 has the least squared error."""

    def error(share: float) -> float:
        scale = step(np.array(share * largest), "int8")
        return float(counts @ np.square(quantised(_MAGNITUDES, scale, "int8") * scale - _MAGNITUDES))

    return min(SHARES, key=error)


def insert(model: ir.Model, largest: Mapping[str, float], kind: Kind) -> None:
    """Put a pair in front of each activation and each weight of `products`, in place; scales are float32.

    Args:
        model: float32.
        largest: magnitude to represent of every activation, by name.
        kind: see `quantize`.
    """
    pairs = _Pairs(model.graph, kind)
    for node, activation, weight, axis in list(products(model.graph)):
        forms = {
            activation: pairs.of_activation(activation, largest[str(activation.name)], node),
            weight: pairs.of_weight(weight, axis, node),
        }
        for index, value in enumerate(node.inputs[:2]):
            assert value is not None
            node.replace_input_with(index, forms[value])
    common.RemoveUnusedNodesPass()(model)


def step(largest: Array, kind: Kind) -> Array:
    """Scale at which a magnitude is the type's largest: rounded up to a number of float16, so that none is beyond."""
    exact = np.where(largest > 0, largest, 1.0) / _LARGEST[kind]
    rounded = exact.astype(np.float16)
    up: Array = np.where(rounded < exact, np.nextafter(rounded, np.float16(np.inf)), rounded)
    return up.astype(np.float32)


def quantised(content: Array, scale: Array, kind: Kind) -> Array:
    """Nearest multiples of the scale, ties to even, as far as the type goes."""
    multiples: Array = np.clip(content / scale, -_LARGEST[kind], _LARGEST[kind])
    return (np.rint(multiples) if kind == "int8" else multiples).astype(_TYPES[kind].numpy())


def by_channel(content: Array, axis: int, kind: Kind) -> tuple[Array, Array]:
    """A weight in 8 bits, and the scale of each channel along an axis."""
    others = tuple(other for other in range(content.ndim) if other != axis)
    scale = step(np.abs(content).max(axis=others, keepdims=True), kind)
    return quantised(content, scale, kind), scale.reshape(-1)


class _Pairs:
    """The dequantised forms of a graph's values, made in front of the first node that reads them."""

    def __init__(self, graph: ir.Graph, kind: Kind) -> None:
        self._graph, self._kind = graph, kind
        self._made: dict[ir.Value, ir.Value] = {}

    def of_activation(self, value: ir.Value, peak: float, reader: ir.Node) -> ir.Value:
        if value not in self._made:
            scale = self._constant(f"{value.name}{SCALE}", step(np.array(peak), self._kind))
            zero = self._constant(f"zero.{self._kind}", np.zeros((), _TYPES[self._kind].numpy()))
            node = ir.node("QuantizeLinear", [value, scale, zero])
            numbers = self._add(node, f"{value.name}{QUANTISED}", _TYPES[self._kind], value, reader)
            self._made[value] = self._dequantise(numbers, scale, value, reader)
        return self._made[value]

    def of_weight(self, value: ir.Value, axis: int, reader: ir.Node) -> ir.Value:
        if value not in self._made:
            numbers, scales = by_channel(constant(value), axis, self._kind)
            self._made[value] = self._dequantise(
                self._constant(f"{value.name}{QUANTISED}", numbers),
                self._constant(f"{value.name}{SCALE}", scales),
                value,
                reader,
                axis=axis,
            )
        return self._made[value]

    def _dequantise(
        self, numbers: ir.Value, scale: ir.Value, value: ir.Value, reader: ir.Node, **attributes: int
    ) -> ir.Value:
        node = ir.node("DequantizeLinear", [numbers, scale], attributes)
        return self._add(node, f"{value.name}{DEQUANTISED}", ir.DataType.FLOAT, value, reader)

    def _add(self, node: ir.Node, name: str, dtype: ir.DataType, like: ir.Value, reader: ir.Node) -> ir.Value:
        (made,) = node.outputs
        made.name, made.type, made.shape = name, ir.TensorType(dtype), like.shape
        self._graph.insert_before(reader, node)
        return made

    def _constant(self, name: str, content: Array) -> ir.Value:
        if name not in self._graph.initializers:
            tensor = ir.tensor(content, name=name)
            made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            self._graph.register_initializer(made)
        return self._graph.initializers[name]


def _name(graph: ir.Graph, known: Collection[ir.Node]) -> None:
    """Name every node `module/value`; what was put in front of a node, or behind the last, belongs to its module."""
    modules = {node: str(node.name).rpartition("/")[0] for node in known}
    for node in reversed(graph):
        if node not in modules:
            neighbours = (
                *(user for user, _ in node.outputs[0].uses()),
                *(value.producer() for value in node.inputs[:1]),
            )
            modules[node] = next((modules[each] for each in neighbours if each in modules), "")
        value = str(node.outputs[0].name)
        node.name = f"{modules[node]}/{value}" if modules[node] else value
