"""Inspection of a LiteRT file of any origin."""

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobilemix import files
from mobilemix.inspection.report import ArtifactReport, Cost, Obstacle, Value, provenance
from mobilemix.targets.litert import flatbuffer, metadata
from mobilemix.targets.litert.flatbuffer import Model

_VIEWS = frozenset({"DEQUANTIZE", "EXPAND_DIMS", "RESHAPE", "SQUEEZE"})
_CONTROL_FLOW = frozenset({"CALL_ONCE", "IF", "STABLEHLO_WHILE", "WHILE"})
_BYTES = {"float64": 8, "int64": 8, "complex64": 8, "float32": 4, "int32": 4, "float16": 2, "int16": 2, "int4": 0.5}


def inspect_litert(path: Path) -> ArtifactReport:
    """Inspect the file; of several graphs, as control flow has them, the first is the one that is counted.

    Raises:
        InputError: it is no LiteRT model, or a malformed one.
    """
    model = flatbuffer.read_model(path)
    graph = model.subgraphs[0]
    constants = {
        index: tensor for index, tensor in enumerate(graph.tensors) if model.buffers[tensor.buffer].data is not None
    }
    stored = {tensor.buffer: tensor for tensor in constants.values()}  # tensors may share what they hold
    by_dtype: Counter[str] = Counter()
    for buffer, tensor in stored.items():
        by_dtype[flatbuffer.dtype(tensor)] += len(model.buffers[buffer].data)
    is_open = any(None in _sizes(tensor) for tensor in graph.tensors)
    return ArtifactReport(
        path=str(path),
        form=f"LiteRT (TFLite schema {model.version})",
        bytes=files.size(path),
        inputs=tuple(_described(model, "inputs", index) for index in graph.inputs),
        outputs=tuple(_described(model, "outputs", index) for index in graph.outputs),
        cost=Cost(
            operators=dict(sorted(flatbuffer.histogram(model).items(), key=lambda item: (-item[1], item[0]))),
            weights=sum(math.prod(flatbuffer.shape(tensor)) for tensor in stored.values()),
            weight_bytes=sum(by_dtype.values()),
            multiply_adds=None if is_open else sum(_multiply_adds(model, each) for each in graph.operators),
            moved_bytes=None
            if is_open
            else sum(
                _bytes(graph.tensors[index])
                for each in graph.operators
                if flatbuffer.operator(model, each) not in _VIEWS
                for index in map(int, (*each.inputs, *each.outputs))
                if index >= 0 and index not in constants
            ),
        ),
        weight_dtypes=dict(by_dtype.most_common()),
        provenance=provenance(
            metadata.entries(model).get("mobilemix.provenance", b"").decode(errors="replace") or None
        ),
        obstacles=tuple(_obstacles(model)),
    )


def _obstacles(model: Model) -> Iterator[Obstacle]:
    operators = [each for graph in model.subgraphs for each in graph.operators]
    custom = Counter(flatbuffer.operator(model, each) for each in operators if flatbuffer.is_custom(model, each))
    for name, count in custom.items():
        yield Obstacle(name, "LiteRT", "a custom operator, for which an app must bring the kernel", count)
    for name, count in flatbuffer.histogram(model).items():
        if name in _CONTROL_FLOW:
            yield Obstacle(name, "XNNPACK, most accelerators", "control flow", count)


def _multiply_adds(model: Model, each: Any) -> int:
    """Of one operator."""
    tensors = model.subgraphs[0].tensors
    shapes = [flatbuffer.shape(tensors[index]) if index >= 0 else () for index in map(int, each.inputs)]
    outputs = math.prod(flatbuffer.shape(tensors[int(each.outputs[0])])) if len(each.outputs) else 0
    match flatbuffer.operator(model, each):
        case "CONV_2D" | "CONV_3D" | "FULLY_CONNECTED":
            return outputs * math.prod(shapes[1][1:])
        case "DEPTHWISE_CONV_2D":
            return outputs * math.prod(shapes[1][1:3])
        case "TRANSPOSE_CONV":
            return math.prod(shapes[2]) * math.prod(shapes[1][:3])
        case "BATCH_MATMUL":
            return outputs * shapes[0][-2 if each.builtinOptions is not None and each.builtinOptions.adjX else -1]
        case _:
            return 0


def _described(model: Model, side: str, index: int) -> Value:
    """An input or output by its name in the signature, or else by the tensor's own."""
    tensor = model.subgraphs[0].tensors[int(index)]
    named = {each.tensorIndex: each.name for one in model.signatureDefs or [] for each in getattr(one, side) or []}
    return Value(flatbuffer.text(named.get(int(index), tensor.name)), flatbuffer.dtype(tensor), _sizes(tensor))


def _sizes(tensor: Any) -> tuple[int | None, ...]:
    """Along each axis; None for one left open."""
    sizes = flatbuffer.shape(tensor) if tensor.shapeSignature is None else tuple(map(int, tensor.shapeSignature))
    return tuple(None if size < 0 else size for size in sizes)


def _bytes(tensor: Any) -> int:
    return math.ceil(math.prod(flatbuffer.shape(tensor)) * _BYTES.get(flatbuffer.dtype(tensor), 1))
