"""Verification of an ONNX file beyond its outputs."""

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch

from mobilemix.errors import TargetError
from mobilemix.parity import TIERS, relative_l2
from mobilemix.quantization.options import Quantization
from mobilemix.recipe import Recipe
from mobilemix.targets.base import LARGEST_HALF, Array, Check, Inputs, Lowered
from mobilemix.targets.onnx.constants import SHAPE, stored_constants
from mobilemix.targets.onnx.convert import check, float_recipe, write
from mobilemix.targets.onnx.half import SUFFIXES, to_half
from mobilemix.targets.onnx.pairs import DEQUANTISED, OWN, QUANTISED, SCALE, ZERO
from mobilemix.targets.onnx.products import Product
from mobilemix.targets.onnx.rewrites import PASSES, Step
from mobilemix.targets.onnx.runtime import OnnxRunner, read_model

OPTIMISATION_TOLERANCE = {"fp32": 1e-5, "fp16": TIERS["fp16"].relative_l2}
"""Largest relative L2 distance between ONNX Runtime with and without its graph optimisations: rounding alone."""

_CONVERSIONS = ("Cast", "QuantizeLinear", "DequantizeLinear")

WEIGHTS_ONLY = ("int8-dynamic", "w8", "w4")
"""Precisions of which the file says nothing about activations."""

NEAR = 0.1
"""Share of float16's largest number from which a magnitude is named."""

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
    lowered: Lowered,
    recipe: Recipe,
    path: Path,
    samples: Sequence[Inputs],
    steps: Sequence[Step] = PASSES,
    layers: Callable[[ir.Graph], Iterable[Product]] | None = None,
    restore: Callable[[ir.Model], None] | None = None,
) -> list[Check]:
    """A file of less precision is its float32 twin, rounded; the twin is right; and float16 can hold what it computes.

    A tolerance that 16 or 8 bits can meet would let real faults pass, so the file itself is compared.

    Args:
        lowered, recipe, path, samples: as of `Target.checks`.
        steps: rewrites that the file was written with.
        layers: of a quantised file, the products of the float32 graph that have to be quantised in it.
        restore: turns operators of integers back into those of dequantised numbers, in place.
    """
    precision = str(recipe.precision)
    with tempfile.TemporaryDirectory() as folder:
        twin_path = Path(folder) / path.name
        write(lowered, float_recipe(recipe), twin_path, steps)
        twin = OnnxRunner(twin_path)
        narrow = ir.load(path)
        if restore is not None:
            restore(narrow)
        difference = first_difference(onnx.load(twin_path), ir.to_proto(narrow), recipe.quantization)
        if layers is not None:
            weights_only = precision in WEIGHTS_ONLY
            found = layers(ir.load(twin_path).graph)
            difference = difference or first_float(found, narrow, weights_only)
        peaks = [(_peak(value), name) for sample in samples for name, value in twin.values(sample)]
        errors = [error for sample in samples for error in errors_of(twin.run(sample), _evaluate(lowered, sample))]
    checks = [
        _within("float32 twin against PyTorch", errors, TWIN_TOLERANCE),
        Check(
            f"{precision} file is the twin, rounded",
            difference is None,
            difference or "node for node, weight for weight",
        ),
    ]
    return [*checks, in_range(peaks)] if recipe.precision == "fp16" or recipe.target != "onnx" else checks


def in_range(peaks: Iterable[tuple[float, str]]) -> Check:
    """Float16 holds every value: the largest magnitudes, with the names of their values, are below its largest number.

    What is beyond is named in full; what comes near it is named where nothing is.
    """
    largest: dict[str, float] = {}
    for peak, name in peaks:
        largest[name] = max(peak, largest.get(name, 0.0))
    ordered = sorted(largest.items(), key=lambda each: -each[1])
    beyond = [(name, peak) for name, peak in ordered if peak > LARGEST_HALF]
    if beyond:
        named = ", ".join(f"{name} {peak:.3g}" for name, peak in beyond)
        return Check("float16 range", False, f"{len(beyond)} values beyond {LARGEST_HALF:.0f}: {named}")
    near = [(name, peak) for name, peak in ordered if peak > NEAR * LARGEST_HALF]
    named = ", ".join(f"{name} {peak:.3g}" for name, peak in (near or ordered[:1]))
    what = "near" if near else "largest magnitude"
    return Check("float16 range", True, f"nothing beyond {LARGEST_HALF:.0f}; {what}: {named or 'no value'}")


def first_difference(full: onnx.ModelProto, narrow: onnx.ModelProto, options: Quantization | None = None) -> str | None:
    """What in a graph of less precision is not its float32 graph with casts and rounded weights; None if nothing.

    Args:
        full, narrow: the two graphs.
        options: of a quantised graph: a weight is rounded to one of its neighbours, which is the nearest unless they
            say otherwise, and a bias that is corrected is anything.
    """
    rounded_to = 1.0 if options is not None and options.rounding != "nearest" else 0.5
    corrected = options is not None and options.bias_correction
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in full.graph.initializer}
    nodes, others = (list(_shape_of(graph, weights)) for graph in (full.graph, narrow.graph))
    for one, other in zip(nodes, others, strict=False):
        if one != other:
            return f"node {other[1]} is not {one[1]}"
    if len(nodes) != len(others):
        return "the numbers of nodes differ"
    for each in narrow.graph.initializer:
        if not _is_right(each, weights, corrected):
            return f"weight {each.name} is not the rounded one"
    for stored in stored_constants(narrow):
        is_bias = stored.integers.dtype == np.int32
        if is_bias and corrected:
            continue
        if fault := stored.fault(weights[_plain(stored.name)], 0.5 if is_bias else rounded_to):
            return f"weight {stored.name} is not the rounded one: {fault}"
    return None


def _is_right(tensor: onnx.TensorProto, weights: Mapping[str, Array], corrected: bool) -> bool:
    """Whether a constant of a narrow graph is the float32 one, rounded; integers are looked at with their scales."""
    content, name = onnx.numpy_helper.to_array(tensor), tensor.name
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    if name in weights:
        expected = weights[name]
        if tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
            expected = to_half(expected, ir.DataType(tensor.data_type))
        return np.array_equal(content, expected, equal_nan=content.dtype.kind == "f")
    if name.endswith(SCALE):
        return bool(np.all(np.isfinite(content) & (content > 0)))
    if OWN in name and content.dtype.kind == "f" and not name.endswith(QUANTISED):
        return corrected  # a bias
    return name.endswith((QUANTISED, SHAPE, ZERO)) or not content.astype(np.float64).any()


def first_float(layers: Iterable[Product], narrow: ir.Model, weights_only: bool = False) -> str | None:
    """Which of the products of a float32 graph, that should be quantised, is not; None if none."""
    expected = {(each.node.op_type, str(each.node.outputs[0].name)): each.place for each in layers}
    for node in narrow.graph:
        place = expected.pop((node.op_type, _plain(str(node.outputs[0].name))), None)
        if place is not None:
            operands = node.inputs[place : place + 1] if weights_only else node.inputs[:2]
            if any(value is None or not str(value.name).endswith(DEQUANTISED) for value in operands):
                return f"{node.op_type} {node.name} is not quantised"
    return f"{next(iter(expected))[1]} is missing" if expected else None


def _shape_of(graph: onnx.GraphProto, weights: Collection[str] = ()) -> Iterator[tuple[object, ...]]:
    """Nodes but for conversions between the forms of a value, with the names of values that all forms share."""
    for node in graph.node:
        inputs, outputs = [_plain(name) for name in node.input], [_plain(name) for name in node.output]
        converts = (node.op_type in _CONVERSIONS and inputs[0] == outputs[0]) or outputs[0] in weights
        if not converts:
            attributes = {each.name: _content(each) for each in node.attribute if not _is_default(node, each)}
            yield node.op_type, outputs[0], inputs, outputs, attributes


def _is_default(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> bool:
    defined = onnx.defs.get_schema(node.op_type, domain=node.domain).attributes.get(attribute.name)
    return defined is not None and attribute == defined.default_value


def _content(attribute: onnx.AttributeProto) -> object:
    if attribute.type != onnx.AttributeProto.GRAPH:
        return attribute.SerializeToString(deterministic=True)
    body = attribute.g  # it is float32 in both files, but may read a value around it in another form
    parts = (*body.input, *body.output, *body.initializer)
    return [part.SerializeToString(deterministic=True) for part in parts], list(_shape_of(body))


def _plain(name: str) -> str:
    for suffix in (*SUFFIXES, QUANTISED, DEQUANTISED):
        name = name.removesuffix(suffix)
    return name.partition(OWN)[0]


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
