"""Int8 without calibration: matrix products in integers, whose activations are rounded in the range of each input.

DynamicQuantizeLinear looks for the range while the model runs, which reads each activation once more. Matrix products
pay that back: on an AVX512-VNNI core ONNX Runtime 1.32 takes from 0.8 (48 rows of 49) to a third (196 rows of 220) of
float32's time. Convolutions do not: ConvInteger takes 3.4 to 4.3 times as long as float32. They hold their weights in
8 bits and compute in float32, as `mobilemix.targets.onnx.weights` tells, and so do products that
`products.roundable` leaves out.
"""

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from mobilemix.errors import InputError
from mobilemix.passes.editing import EXACT
from mobilemix.quantization.moments import Moments
from mobilemix.quantization.options import Quantization
from mobilemix.targets.base import Inputs
from mobilemix.targets.onnx.formats import FORMATS, zeros
from mobilemix.targets.onnx.observation import layer_moments
from mobilemix.targets.onnx.pairs import QUANTISED, SCALE, ZERO, Pairs, name_nodes, own
from mobilemix.targets.onnx.products import Product, integers_of, kept, largest, products, roundable
from mobilemix.targets.onnx.rewrites.constants import constant
from mobilemix.targets.onnx.weights import hold

_INTEGER = "MatMulInteger"
_TURNED, _PRODUCT = ".turned", ".product"
"""What the names of a transposed weight, and of a product to which a bias is to be added, end in."""


def quantize(source: Path, destination: Path, samples: Sequence[Inputs], options: Quantization) -> None:
    """Write a float32 file again with its matrix products in integers, and the weights of its convolutions in 8 bits.

    Before:   x → Gemm(w, b) → y
    After:    x → DynamicQuantizeLinear → MatMulInteger(w') → Cast → Mul(scale of x · scale of w) → Add(b) → y

    Args:
        source: ONNX, float32.
        destination: where to write.
        samples: typical inputs, for the rounding of weights that asks for them; else none is looked at.
        options: format, rounding, and layers that stay in float.

    Raises:
        InputError: nothing to quantise, a format with signed activations, or a correction of biases.
    """
    form = FORMATS[options.format]
    if form.signed:
        raise InputError(f"DynamicQuantizeLinear makes unsigned integers, not those of {options.format}; use u8s8")
    if options.bias_correction:
        raise InputError("biases of int8-dynamic are not corrected: no range is known before; use int8")
    model = ir.load(source)
    graph, nodes = model.graph, list(model.graph)
    found = layers(graph, options)
    if not found:
        raise InputError(f"{source.name} has no convolution or product with constant weights to quantise; use fp16")
    known = layer_moments(source, found, samples, options)
    integral = {each.node for each in roundable(graph) if _is_matrix_product(each)}
    pairs = Pairs(graph)
    made: dict[ir.Value, Sequence[ir.Value]] = {}
    for layer in found:
        if layer.node in integral:
            _multiply_integers(layer, graph, pairs, options, known.get(layer.name), made)
        else:
            hold(layer, 8, pairs, options, known.get(layer.name))
    common.RemoveUnusedNodesPass()(model)
    name_nodes(graph, [node for node in nodes if node.graph is graph])
    ir.save(model, destination)


def layers(graph: ir.Graph, options: Quantization) -> list[Product]:
    """Products whose weights are in 8 bits."""
    left = kept(graph, options)
    return [each for each in products(graph) if each.name not in left and not str(each.weight.name).startswith(EXACT)]


def _is_matrix_product(layer: Product) -> bool:
    """Whether it is x·w, or the Gemm x·w + b; what is neither holds its weight."""
    node, attributes = layer.node, layer.node.attributes
    if node.op_type == "MatMul":
        return layer.place == 1 and layer.has_rows()
    scaled = any(attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    return node.op_type == "Gemm" and layer.has_rows() and not scaled and len(node.inputs) == 3


def _multiply_integers(
    layer: Product,
    graph: ir.Graph,
    pairs: Pairs,
    options: Quantization,
    known: Moments | None,
    made: dict[ir.Value, Sequence[ir.Value]],
) -> None:
    node, form, name = layer.node, FORMATS[options.format], own(layer.weight, layer.node)
    output, content = node.outputs[0], constant(layer.weight)
    grid = form.weight(largest(content, layer.axis), layer.axis)
    held = pairs.constant(f"{name}{QUANTISED}", integers_of(layer, content, grid, options, known))
    if layer.axis == 0:
        turned = ir.node("Transpose", [held], {"perm": [1, 0]})
        held = pairs.add(turned, f"{name}{_TURNED}", content.shape[::-1], node, held.dtype)
    if layer.activation not in made:
        made[layer.activation] = _rounded(layer.activation, graph, node)
    rounded, scale, zero = made[layer.activation]
    middle = [] if form.signed_weights else [pairs.constant(f"{name}{ZERO}", zeros(grid))]
    product = ir.node(_INTEGER, [rounded, held, zero, *middle])
    sums = pairs.add(product, f"{output.name}.sums", output.shape, node, ir.DataType.INT32)
    cast = pairs.add(ir.node("Cast", [sums], {"to": ir.DataType.FLOAT}), f"{output.name}.cast", output.shape, node)
    steps = pairs.constant(f"{name}{SCALE}", grid.scale)
    both = pairs.add(ir.node("Mul", [scale, steps]), f"{output.name}{SCALE}", grid.scale.shape, node)
    last = ir.node("Mul", [cast, both])
    if node.op_type == "Gemm":
        last = ir.node("Add", [pairs.add(last, f"{output.name}{_PRODUCT}", output.shape, node), node.inputs[2]])
    last.name = node.name
    ir.convenience.replace_nodes_and_values(graph, node, [node], [last], [output], last.outputs)


def _rounded(value: ir.Value, graph: ir.Graph, before: ir.Node) -> Sequence[ir.Value]:
    """The integers of a value, their scale and their zero point."""
    node = ir.node("DynamicQuantizeLinear", [value], num_outputs=3)
    types = (ir.DataType.UINT8, ir.DataType.FLOAT, ir.DataType.UINT8)
    for made, ending, dtype in zip(node.outputs, (QUANTISED, SCALE, ZERO), types, strict=True):
        made.name, made.type = f"{value.name}{ending}", ir.TensorType(dtype)
        made.shape = value.shape if ending == QUANTISED else ir.Shape(())
    graph.insert_before(before, node)
    return tuple(node.outputs)


def in_float(model: ir.Model) -> None:
    """Turn each product of integers of such a file back into one of floats, in place, for comparison.

    Before:   x → DynamicQuantizeLinear → MatMulInteger(w') → Cast → Mul(scale of x · scale of w) → Add(b) → y
    After:    x → Gemm(DequantizeLinear(w'), b) → y

    What is wired otherwise stays, and is no product of a float graph.
    """
    graph, pairs = model.graph, Pairs(model.graph)
    for node in [node for node in graph if node.op_type == _INTEGER]:
        rounded, held, zero, *middle = node.inputs
        rounding, scaled = _maker(rounded), _reader(_reader(node))
        scale, steps = _maker(scaled.inputs[1]).inputs
        assert held is not None
        assert steps is not None
        if [rounded, scale, zero] != list(rounding.outputs):
            continue
        turned = held.producer()
        weight = held if turned is None else turned.inputs[0]
        assert weight is not None
        name, axis = str(weight.name).removesuffix(QUANTISED), int(turned is None)
        floats = pairs.read(weight, steps, middle[0] if middle else None, name, node, axis=axis)
        if str(scaled.outputs[0].name).endswith(_PRODUCT):
            last = _reader(scaled)
            product = ir.node("Gemm", [*rounding.inputs, floats, last.inputs[1]], {"transB": 1 - axis})
        else:
            last, product = scaled, ir.node("MatMul", [*rounding.inputs, floats])
        product.name = last.name
        ir.convenience.replace_nodes_and_values(graph, last, [last], [product], last.outputs, product.outputs)
    common.RemoveUnusedNodesPass()(model)


def _reader(node: ir.Node) -> ir.Node:
    (user, _), *_ = node.outputs[0].uses()
    return user


def _maker(value: ir.Value | None) -> ir.Node:
    assert value is not None
    node = value.producer()
    assert node is not None
    return node
