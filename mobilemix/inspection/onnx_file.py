"""Inspection of an ONNX file of any origin."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from mobilemix import files
from mobilemix.errors import InputError
from mobilemix.inspection.obstacles import onnx_runtime_lacks
from mobilemix.inspection.report import ArtifactReport, Cost, Obstacle, Precision, Value, provenance
from mobilemix.models import flops
from mobilemix.targets.onnx.runtime import read_model
from mobilemix.targets.tensorrt import precision, preflight

_VIEWS = frozenset({"Constant", "Flatten", "Identity", "Reshape", "Shape", "Squeeze", "Unsqueeze"})
_STANDARD = ("", "ai.onnx")
_LOOPS = frozenset({"If", "Loop", "Scan"})


def inspect_onnx(path: Path) -> ArtifactReport:
    """Inspect the file; shapes that it does not state are inferred where they can be.

    Raises:
        InputError: it is no ONNX model.
    """
    try:
        proto = read_model(path)
        model = ir.from_proto(proto)
        ShapeInferencePass(strict_mode=False, data_prop=True)(model)
    except (ValueError, TypeError, KeyError, onnx.shape_inference.InferenceError) as error:
        raise InputError(f"{path} is not a valid ONNX model: {' '.join(str(error).split())}") from error
    steps = list(_steps(model.graph, 1))
    nodes = [node for node, _ in steps]
    weights = {value.name: tensor for value, tensor in _weights(model.graph, nodes)}
    by_dtype: Counter[str] = Counter()
    for tensor in weights.values():
        by_dtype[_dtype(tensor.dtype)] += tensor.nbytes
    costs = [_times(_multiply_adds(node), count) for node, count in steps]
    moved = [
        _times(_bytes(value), count)
        for node, count in steps
        if node.op_type not in _VIEWS
        for value in _activations(node)
    ]
    return ArtifactReport(
        path=str(path),
        form=f"ONNX opset {model.opset_imports.get('', model.opset_imports.get('ai.onnx'))}",
        bytes=files.size(path) + sum(map(files.size, _beside(path, weights.values()))),
        inputs=tuple(_described(value) for value in model.graph.inputs if not value.is_initializer()),
        outputs=tuple(map(_described, model.graph.outputs)),
        cost=Cost(
            operators=dict(Counter(map(_name, nodes)).most_common()),
            weights=sum(tensor.size for tensor in weights.values()),
            weight_bytes=sum(by_dtype.values()),
            multiply_adds=_total(costs),
            moved_bytes=_total(moved),
        ),
        weight_dtypes=dict(by_dtype.most_common()),
        provenance=provenance(model.metadata_props.get("mobilemix.provenance")),
        obstacles=(*_obstacles(model, nodes), *_of_tensorrt(proto)),
        precisions=dict(_precisions(nodes, costs)),
        layers=precision.layers(nodes),
    )


def _precisions(nodes: Sequence[ir.Node], costs: Sequence[int | None]) -> Iterator[tuple[str, Precision]]:
    """What computes in each precision, given the multiply-adds of every node; the most layers first."""
    found: dict[str, list[int | None]] = {}
    for node, cost in zip(nodes, costs, strict=True):
        if (name := precision.of(node)) is not None:
            found.setdefault(name, []).append(cost)
    for name in sorted(found, key=lambda name: -len(found[name])):
        yield name, Precision(len(found[name]), _total(found[name]))


def _steps(graph: ir.Graph, count: int | None) -> Iterator[tuple[ir.Node, int | None]]:
    """Every node, and how often it runs: None in a Loop, whose end depends on data; both branches of an If."""
    for node in graph:
        yield node, count
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _steps(attribute.as_graph(), _times(count, _length(node)))


def _length(node: ir.Node) -> int | None:
    """How often a node runs the graphs within."""
    if node.op_type != "Scan":
        return None if node.op_type == "Loop" else 1
    inputs = node.attributes["num_scan_inputs"].as_int()
    axes = node.attributes.get("scan_input_axes")
    try:
        return _shape(node.inputs[-inputs])[axes.as_ints()[0] if axes is not None else 0]
    except _UnknownShapeError:
        return None


def _weights(graph: ir.Graph, nodes: Iterable[ir.Node]) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Initialisers, and what Constant nodes hold, of the graph and all graphs within."""
    graphs = [
        graph,
        *(
            attribute.as_graph()
            for node in nodes
            for attribute in node.attributes.values()
            if attribute.type == ir.AttributeType.GRAPH
        ),
    ]
    for each in graphs:
        for value in each.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value
    for node in nodes:
        if node.op_type == "Constant" and (value := node.attributes.get("value")) is not None:
            yield node.outputs[0], value.as_tensor()


def _beside(path: Path, weights: Iterable[ir.TensorProtocol]) -> set[Path]:
    """Files with weights; those that lead out of the model's folder are not looked at."""
    names = {Path(tensor.location).name for tensor in weights if isinstance(tensor, ir.ExternalTensor)}
    return {path.with_name(name) for name in names if path.with_name(name).is_file()}


def _obstacles(model: ir.Model, nodes: Iterable[ir.Node]) -> Iterator[Obstacle]:
    defined = {(function.domain, function.name) for function in model.functions.values()}
    counts = Counter((node.domain, node.op_type, _name(node)) for node in nodes)
    for (domain, operator, name), count in counts.items():
        if domain not in _STANDARD:
            if (domain, operator) not in defined:
                yield Obstacle(name, "every other runtime", f"{domain} is no domain of the ONNX standard", count)
            continue
        if operator in onnx_runtime_lacks():
            yield Obstacle(name, "ONNX Runtime", "has no CPU kernel", count)
        if operator in _LOOPS:
            yield Obstacle(name, "Core ML, most accelerators", "control flow", count)


def _of_tensorrt(model: onnx.ModelProto) -> Iterator[Obstacle]:
    counts = Counter((each.operator, each.reason) for each in preflight.refusals(model))
    for (operator, reason), count in counts.items():
        yield Obstacle(operator, "TensorRT", reason, count)


def _multiply_adds(node: ir.Node) -> int | None:
    """Of one node, run once."""
    try:
        match node.op_type:
            case "Conv":
                return flops.convolution(_shape(node.outputs[0]), _shape(node.inputs[1]))
            case "ConvTranspose":
                return flops.transposed_convolution(_shape(node.inputs[0]), _shape(node.inputs[1]))
            case "MatMul":
                return math.prod(_shape(node.outputs[0])) * _shape(node.inputs[0])[-1]
            case "Gemm":
                transposed = node.attributes.get("transA")
                inner = 0 if transposed is not None and transposed.as_int() else 1
                return math.prod(_shape(node.outputs[0])) * _shape(node.inputs[0])[inner]
            case "Einsum":
                return flops.einstein_sum(
                    node.attributes["equation"].as_string(), [_shape(each) for each in node.inputs]
                )
            case _:
                return 0
    except _UnknownShapeError:
        return None


class _UnknownShapeError(Exception):
    pass


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None or not all(isinstance(size, int) for size in value.shape):
        raise _UnknownShapeError
    return tuple(size for size in value.shape if isinstance(size, int))


def _activations(node: ir.Node) -> Iterator[ir.Value]:
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.const_value is None:
            yield value


def _bytes(value: ir.Value) -> int | None:
    if value.dtype is None:
        return None
    try:
        return math.ceil(math.prod(_shape(value)) * int(value.dtype.bitwidth) / 8)
    except (_UnknownShapeError, TypeError):  # the latter for strings
        return None


def _times(value: int | None, count: int | None) -> int | None:
    return None if value is None or count is None else value * count


def _total(values: Iterable[int | None]) -> int | None:
    total = 0
    for value in values:
        if value is None:
            return None
        total += value
    return total


def _described(value: ir.Value) -> Value:
    dtype = "unknown" if value.dtype is None else _dtype(value.dtype)
    sizes = () if value.shape is None else value.shape
    return Value(str(value.name), dtype, tuple(size if isinstance(size, int) else size.value for size in sizes))


def _dtype(dtype: ir.DataType) -> str:
    """ "float32" rather than ONNX's "FLOAT"."""
    return "string" if dtype is ir.DataType.STRING else str(dtype.numpy())


def _name(node: ir.Node) -> str:
    return node.op_type if node.domain in _STANDARD else f"{node.domain}::{node.op_type}"
