"""Weights alone in 8 or 4 bits: a quarter or a sixth of the bytes, and the arithmetic of float32.

A weight is held in integers, which a Cast and a product with the scale turn into float32. ONNX Runtime folds these when
it loads the file and then runs as fast as the float32 file. DequantizeLinear would say the same, but its optimiser
keeps each, and with them convolutions from the blocked layout: measured with version 1.32, 1.3 to 2.9 times as long.

What stays float32: Fourier matrices and the like (`mobilemix.passes.editing.EXACT`), norms, biases.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from mobilemix.errors import InputError
from mobilemix.passes.editing import EXACT
from mobilemix.quantization.affine import Grid, from_integers, grid_between
from mobilemix.quantization.moments import Moments
from mobilemix.quantization.options import FLOAT, Quantization, check_patterns, precision_of
from mobilemix.quantization.rounding import bias_correction
from mobilemix.targets.base import Array, Inputs
from mobilemix.targets.onnx.constants import SHAPE
from mobilemix.targets.onnx.observation import layer_moments
from mobilemix.targets.onnx.pairs import DEQUANTISED, QUANTISED, SCALE, Pairs, name_nodes, own
from mobilemix.targets.onnx.products import Product, integers_of, largest, products
from mobilemix.targets.onnx.rewrites.constants import constant

BITS: Mapping[str, int] = {"w8": 8, "w4": 4}
BLOCK = 32
"""About so many weights of 4 bits, next to each other in what is summed over, have a scale of their own."""


def quantize(source: Path, destination: Path, samples: Sequence[Inputs], options: Quantization, precision: str) -> None:
    """Write a float32 file again with the weights of its convolutions and matrix products in integers.

    Before:   x → Conv(w) → y
    After:    x → Conv(Mul(Cast(w'), scale)) → y

    Args:
        source: ONNX, float32; of 4 bits, opset 21 or newer.
        destination: where to write.
        samples: typical inputs, for the rounding of weights that asks for them; else none is looked at.
        options: rounding, correction of biases, and layers of another precision: "w8", "w4" or "float".
        precision: "w8" or "w4". In 4 bits are matrices and convolutions of 1×1; others are in 8.

    Raises:
        InputError: there is nothing to quantise.
    """
    model = ir.load(source)
    found = dict(layers(model.graph, options, precision))
    if not found:
        raise InputError(f"{source.name} has no convolution or product with constant weights to hold in {precision}")
    known = layer_moments(source, list(found), samples, options)
    nodes, pairs = list(model.graph), Pairs(model.graph)
    for layer, bits in found.items():
        hold(layer, bits, pairs, options, known.get(layer.name))
    common.RemoveUnusedNodesPass()(model)
    name_nodes(model.graph, nodes)
    ir.save(model, destination)


def layers(graph: ir.Graph, options: Quantization, precision: str) -> Iterator[tuple[Product, int]]:
    """Products whose weights are to be held in integers, and of how many bits.

    Raises:
        UnknownNameError: a pattern that fits no product.
    """
    found = list(products(graph))
    check_patterns(options, ((each.name, each.module) for each in found))
    for each in found:
        asked = precision_of(options, precision, each.name, each.module)
        if asked != FLOAT and not str(each.weight.name).startswith(EXACT):
            yield each, BITS[asked] if _has_blocks(each) else 8


def _has_blocks(layer: Product) -> bool:
    shape = tuple(map(int, layer.weight.shape))
    return layer.has_rows() and math.prod(shape[2:]) == 1 and not layer.depthwise


def hold(layer: Product, bits: int, pairs: Pairs, options: Quantization, known: Moments | None) -> None:
    """Replace the weight of a product by integers of 8 or 4 bits and what turns them into float32, in place."""
    node, content, name = layer.node, constant(layer.weight), own(layer.weight, layer.node)
    grid, parts = blocks(layer, content) if bits == 4 else (_by_channel(layer, content), content.shape)
    integers = integers_of(layer, content, grid, options, known)
    stored = integers.reshape(parts)
    scale = np.broadcast_to(_spread(grid, content.ndim), content.shape).reshape(parts)
    scale = scale.max(_inside(layer, parts, content.shape), keepdims=True)
    held = pairs.constant(f"{name}{QUANTISED}", ir.tensor(stored.astype(ml_dtypes.int4)) if bits == 4 else stored)
    cast = pairs.add(ir.node("Cast", [held], {"to": ir.DataType.FLOAT}), f"{name}.cast", parts, node)
    factor = pairs.constant(f"{name}{SCALE}", scale)
    last = parts == content.shape
    made = pairs.add(ir.node("Mul", [cast, factor]), f"{name}{DEQUANTISED if last else '.blocks'}", parts, node)
    if not last:
        shape = pairs.constant(f"{name}{SHAPE}", np.array(content.shape, np.int64))
        made = pairs.add(ir.node("Reshape", [made, shape]), f"{name}{DEQUANTISED}", content.shape, node)
    node.replace_input_with(layer.place, made)
    if options.bias_correction and known is not None and len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = node.inputs[2]
        numbers = from_integers(integers, grid)
        corrected = constant(bias) + bias_correction(layer.rows(content), layer.rows(numbers), known)
        node.replace_input_with(2, pairs.constant(own(bias, node), corrected))


def _by_channel(layer: Product, content: Array) -> Grid:
    magnitude = largest(content, layer.axis)
    return grid_between(-magnitude, magnitude, narrow=True, axis=layer.axis)


def blocks(layer: Product, content: Array) -> tuple[Grid, tuple[int, ...]]:
    """A grid of 4 bits with a scale for each weight, the same in a block; and the shape of the weight in blocks."""
    summed = _summed(layer)
    size = content.shape[summed]
    block = min((each for each in range(1, size + 1) if size % each == 0), key=lambda each: abs(math.log(each / BLOCK)))
    parts = (*content.shape[:summed], size // block, block, *content.shape[summed + 1 :])
    magnitude = np.abs(content.reshape(parts)).max(summed + 1, keepdims=True)
    everywhere = np.broadcast_to(magnitude, parts).reshape(content.shape)
    return grid_between(-everywhere, everywhere, bits=4, narrow=True), parts


def _summed(layer: Product) -> int:
    """The weight's axis that products are summed over."""
    return 1 if layer.node.op_type == "Conv" else 1 - layer.axis


def _inside(layer: Product, parts: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of a stored weight along which the scale is the same."""
    if parts == shape:
        return tuple(axis for axis in range(len(shape)) if axis != layer.axis)
    return (_summed(layer) + 1,)


def _spread(grid: Grid, rank: int) -> Array:
    """A grid's scale in a shape that broadcasts over its array."""
    return grid.scale if grid.axis is None else grid.scale.reshape([-1 if i == grid.axis else 1 for i in range(rank)])
