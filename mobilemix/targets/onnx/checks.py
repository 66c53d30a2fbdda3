"""Verification of an ONNX file beyond its outputs."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

from mobilemix.errors import TargetError
from mobilemix.parity import TIERS, relative_l2
from mobilemix.recipe import CALIBRATED, Recipe, opset_of
from mobilemix.targets.base import LARGEST_HALF, Array, Check, Inputs, Lowered
from mobilemix.targets.onnx.convert import check, write
from mobilemix.targets.onnx.half import SUFFIXES, to_half
from mobilemix.targets.onnx.quantize import DEQUANTISED, QUANTISED, SCALE, Kind, by_channel, products
from mobilemix.targets.onnx.rewrites import PASSES, Step
from mobilemix.targets.onnx.runtime import OnnxRunner, read_model

OPTIMISATION_TOLERANCE = {"fp32": 1e-5, "fp16": TIERS["fp16"].relative_l2}
"""Largest relative L2 distance between ONNX Runtime with and without its graph optimisations: rounding alone."""

_CONVERSIONS = ("Cast", "QuantizeLinear", "DequantizeLinear")

TWIN_TOLERANCE = 1e-5
"""Largest relative L2 distance between the float32 build and the lowered program in PyTorch."""


def valid(path: Path) -> Check:
    """The ONNX checker accepts the file."""
    try:
        check(path)
    except TargetError as error:
        return Check("onnx.checker", False, str(error))
    return Check("onnx.checker", True, "valid, all shapes inferred")


def standard(path: Path) -> Check:
    """The file needs nothing but the operators of ONNX itself."""
    model = read_model(path)
    others = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    (opset,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    detail = f"operators of {', '.join(others)}" if others else f"ai.onnx opset {opset} only"
    return Check("standard operators", not others and not model.functions, detail)


def optimisable(path: Path, precision: str, samples: Sequence[Inputs]) -> Check:
    """ONNX Runtime's own graph optimisations keep the results."""
    optimised, plain = OnnxRunner(path), OnnxRunner(path, optimised=False)
    errors = [error for sample in samples for error in errors_of(optimised.run(sample), plain.run(sample))]
    return _within("ONNX Runtime with and without optimisation", errors, OPTIMISATION_TOLERANCE[precision])


def rounding(
    lowered: Lowered, recipe: Recipe, path: Path, samples: Sequence[Inputs], steps: Sequence[Step] = PASSES
) -> list[Check]:
    """A file of less precision is its float32 twin, rounded; the twin is right; and float16 can hold what it computes.

    A tolerance that 16 or 8 bits can meet would let real faults pass, so the file itself is compared.
    """
    precision = str(recipe.precision)
    with tempfile.TemporaryDirectory() as folder:
        twin_path = Path(folder) / path.name
        write(lowered, dataclasses.replace(recipe, precision="fp32", opset=opset_of(recipe)), twin_path, steps)
        twin = OnnxRunner(twin_path)
        difference = first_difference(onnx.load(twin_path), onnx.load(path))
        if precision in CALIBRATED:
            difference = difference or first_float(ir.load(twin_path), ir.load(path))
        peaks = [(_peak(value), name) for sample in samples for name, value in twin.values(sample)]
        errors = [error for sample in samples for error in errors_of(twin.run(sample), _evaluate(lowered, sample))]
    peak, where = max(peaks, default=(0.0, "no value"))
    found = [
        _within("float32 twin against PyTorch", errors, TWIN_TOLERANCE),
        Check(
            f"{precision} file is the twin, rounded",
            difference is None,
            difference or "node for node, weight for weight",
        ),
    ]
    if precision != "bf16":  # which has float32's range
        detail = f"largest magnitude {peak:.3g} of {LARGEST_HALF:.0f}, {where}"
        found.append(Check("float16 range", peak <= LARGEST_HALF, detail))
    return found


def first_difference(full: onnx.ModelProto, narrow: onnx.ModelProto) -> str | None:
    """What in a graph of less precision is not its float32 graph with casts and rounded weights; None if nothing."""
    nodes, others = list(_shape_of(full.graph)), list(_shape_of(narrow.graph))
    for one, other in zip(nodes, others, strict=False):
        if one != other:
            return f"node {other[1]} is not {one[1]}"
    if len(nodes) != len(others):
        return "the numbers of nodes differ"
    weights = {_plain(tensor.name): onnx.numpy_helper.to_array(tensor) for tensor in full.graph.initializer}
    contents = {**weights, **dict(_quantised(narrow.graph, weights))}
    for tensor in narrow.graph.initializer:
        content, name = onnx.numpy_helper.to_array(tensor), _plain(tensor.name)
        expected = contents.get(tensor.name, contents.get(name))
        if expected is None:
            right = bool(
                np.all(content > 0 if name.endswith(SCALE) else content == 0)
            )  # of an activation, or a zero point
        else:
            if tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
                expected = to_half(expected, ir.DataType(tensor.data_type))
            right = np.array_equal(content, expected, equal_nan=content.dtype.kind == "f")
        if not right:
            return f"weight {tensor.name} is not the rounded one"
    return None


def _quantised(graph: onnx.GraphProto, weights: Mapping[str, Array]) -> Iterator[tuple[str, Array]]:
    """Contents that the quantised weights of a graph, and their scales, must have."""
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in types:
            weight, scale = node.input[:2]
            kind: Kind = "int8" if types[weight] == onnx.TensorProto.INT8 else "fp8"
            (axis,) = (attribute.i for attribute in node.attribute if attribute.name == "axis")
            numbers, scales = by_channel(weights[_plain(weight)], axis, kind)
            yield weight, numbers
            yield _plain(scale), scales


def first_float(full: ir.Model, narrow: ir.Model) -> str | None:
    """Which product of a float32 graph that should be quantised is not; None if none."""
    expected = {(node.op_type, str(node.outputs[0].name)) for node, *_ in products(full.graph)}
    for node in narrow.graph:
        if (node.op_type, _plain(str(node.outputs[0].name))) in expected:
            for value in node.inputs[:2]:
                if value is None or not str(value.name).endswith(DEQUANTISED):
                    return f"{node.op_type} {node.name} is not quantised"
    return None


def _shape_of(graph: onnx.GraphProto) -> Iterator[tuple[object, ...]]:
    """Nodes but for conversions between the forms of a value, with the names of values that all forms share."""
    for node in graph.node:
        inputs, outputs = [_plain(name) for name in node.input], [_plain(name) for name in node.output]
        if node.op_type not in _CONVERSIONS or inputs[0] != outputs[0]:
            attributes = {attribute.name: _content(attribute) for attribute in node.attribute}
            yield node.op_type, outputs[0], inputs, outputs, attributes


def _content(attribute: onnx.AttributeProto) -> object:
    if attribute.type != onnx.AttributeProto.GRAPH:
        return attribute.SerializeToString(deterministic=True)
    body = attribute.g  # it is float32 in both files, but may read a value around it in another form
    parts = (*body.input, *body.output, *body.initializer)
    return [part.SerializeToString(deterministic=True) for part in parts], list(_shape_of(body))


def _plain(name: str) -> str:
    for suffix in (*SUFFIXES, QUANTISED, DEQUANTISED):
        name = name.removesuffix(suffix)
    return name


def _evaluate(lowered: Lowered, sample: Inputs) -> dict[str, Array]:
    with torch.no_grad():
        outputs = lowered.program.module()(*(torch.from_numpy(sample[name]) for name in lowered.input_names))
    leaves = torch.utils._pytree.tree_leaves(outputs)
    return {name: leaf.numpy() for name, leaf in zip(lowered.output_names, leaves, strict=True)}


def errors_of(values: Mapping[str, Array], expected: Mapping[str, Array]) -> list[float]:
    """Relative L2 distance of each output."""
    return [relative_l2(values[name], reference) for name, reference in expected.items()]


def _peak(value: Array) -> float:
    """Infinities are the model's own, such as masks, and float16 holds them."""
    return float(np.abs(value[~np.isinf(value)]).max(initial=0))


def _within(name: str, errors: Sequence[float], tolerance: float) -> Check:
    worst = float(np.max(errors, initial=0))
    return Check(name, bool(worst <= tolerance), f"relative L2 {worst:.1e} of {tolerance:.0e}")
