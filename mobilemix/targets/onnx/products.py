"""The layers of an ONNX graph that have weights: convolutions and matrix products with a constant operand."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from mobilemix.passes.editing import EXACT, WIDE
from mobilemix.quantization.affine import Grid, to_integers
from mobilemix.quantization.moments import Moments, of_conv, of_matmul
from mobilemix.quantization.options import FLOAT, Quantization, check_patterns, precision_of
from mobilemix.quantization.rounding import adaround
from mobilemix.targets.base import Array

MOVEMENTS = ("Concat", "Expand", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze")
NORMS = ("InstanceNormalization", "LayerNormalization", "GroupNormalization")


@dataclasses.dataclass(frozen=True)
class Product:
    """A convolution or matrix product with constant weights.

    Attributes:
        node: Conv, Gemm or MatMul.
        activation: its computed operand.
        weight: its constant one.
        place: of the weight among the node's inputs.
        axis: of the weight's output channels.
    """

    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    place: int
    axis: int

    @property
    def name(self) -> str:
        """What patterns of `Quantization.layers` name it: "module/value"."""
        return str(self.node.name)

    @property
    def module(self) -> str:
        """Path of the module that it is from."""
        return self.name.rpartition("/")[0]

    @property
    def depthwise(self) -> bool:
        """Whether each channel is convolved by itself."""
        return self.node.op_type == "Conv" and int(self.weight.shape[1]) == 1 and self.groups > 1

    @property
    def groups(self) -> int:
        """Of a convolution."""
        return int(self.node.attributes.get_int("group", 1))

    def rows(self, content: Array) -> Array:
        """The weight, of its own shape, as (O, K): a row for each output channel. Only of convolutions and matrices."""
        return content.reshape(len(content), -1) if self.node.op_type == "Conv" or self.axis == 0 else content.T

    def shaped(self, rows: Array) -> Array:
        """The inverse of `rows`."""
        if self.node.op_type == "Conv" or self.axis == 0:
            return rows.reshape(tuple(map(int, self.weight.shape)))
        return rows.T

    def has_rows(self) -> bool:
        """Whether `rows` and `moments` are defined: not for a stack of matrices."""
        transposed = self.node.op_type == "Gemm" and self.node.attributes.get_int("transA", 0)
        return self.node.op_type == "Conv" or (len(self.weight.shape) == 2 and not transposed)

    def moments(self, content: Array, seed: int) -> Moments:
        """Of the numbers that meet a row of the weight, in one sample's activation."""
        if self.node.op_type != "Conv":
            return of_matmul(content if self.place == 1 else content.swapaxes(-1, -2), seed=seed)
        kernel = [int(size) for size in self.weight.shape[2:]]
        ones = [1] * len(kernel)
        attributes = self.node.attributes
        return of_conv(
            content,
            kernel,
            attributes.get_ints("strides", ones),
            attributes.get_ints("pads", [0, 0] * len(kernel)),
            attributes.get_ints("dilations", ones),
            self.groups,
            seed=seed,
        )


def products(graph: ir.Graph) -> Iterator[Product]:
    """Every one of a graph, in its order; those in bodies of loops are not looked at."""
    for node in graph:
        if (found := product(node)) is not None:
            yield found


def product(node: ir.Node) -> Product | None:
    """A node with its operands told apart, if it is one."""
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return None
    first, second = node.inputs[:2]
    assert first is not None
    assert second is not None
    if second.is_initializer() and len(second.shape) > 1 and not first.is_initializer():
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0)
        axis = 0 if node.op_type == "Conv" else len(second.shape) - (2 if transposed else 1)
        return Product(node, first, second, 1, axis)
    if node.op_type == "MatMul" and first.is_initializer() and len(first.shape) > 1:
        return Product(node, second, first, 0, len(first.shape) - 2)
    return None


def roundable(graph: ir.Graph) -> Iterator[Product]:
    """Products that eight bits are enough for.

    The others, and what reads one of them before a norm or a residual sum, have few numbers that are much larger than
    the others: products with Fourier matrices, sums of scans, and products of two activations but those of a softmax.
    """
    attention: set[ir.Value] = set()  # softmaxes, wherever they are moved
    heavy: set[ir.Value] = set()  # values with few numbers that are much larger than the others
    for node in graph:
        computed = [value for value in node.inputs if value is not None and not value.is_initializer()]
        if node.op_type == "Softmax" or (node.op_type in MOVEMENTS and attention.issuperset(computed)):
            attention.update(node.outputs)
        elif node.op_type == "MatMul" and len(computed) == 2:
            if attention.isdisjoint(computed):
                heavy.update(node.outputs)
        elif (found := product(node)) is not None:
            exact = str(found.weight.name).startswith(EXACT) or str(node.outputs[0].name).startswith(WIDE)
            if exact or found.activation in heavy:
                heavy.update(node.outputs)
            else:
                yield found
        elif computed and heavy.issuperset(computed) and node.op_type not in NORMS:
            heavy.update(node.outputs)


def kept(graph: ir.Graph, options: Quantization) -> frozenset[str]:
    """Names of the products that a pattern of the user's leaves in float; raises as `check_patterns` does."""
    found = list(products(graph))
    check_patterns(options, ((each.name, each.module) for each in found))
    return frozenset(each.name for each in found if precision_of(options, "", each.name, each.module) == FLOAT)


def integers_of(layer: Product, content: Array, grid: Grid, options: Quantization, known: Moments | None) -> Array:
    """A product's weight as it is to be rounded, on a grid along its `axis`, or with a scale for each number."""
    if options.rounding == "nearest" or known is None:
        return to_integers(content, grid)
    if grid.axis is None:
        by_row = dataclasses.replace(grid, scale=layer.rows(grid.scale), zero_point=layer.rows(grid.zero_point))
    else:
        by_row = dataclasses.replace(grid, axis=0)
    return layer.shaped(adaround(layer.rows(content), by_row, known))


def largest(content: Array, axis: int) -> Array:
    """Magnitude of each slice along an axis."""
    found: Array = np.abs(content).max(axis=tuple(other for other in range(content.ndim) if other != axis))
    return found
