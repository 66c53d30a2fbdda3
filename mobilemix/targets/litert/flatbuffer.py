"""`.tflite` files as objects of their schema: reading, writing, and what their numbers mean."""

import struct
from collections import Counter
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from mobilemix.errors import InputError
from mobilemix.targets.base import Array

IDENTIFIER = b"TFL3"
ALIGNMENT = 16
"""Bytes at whose multiples the schema wants weights, so that kernels may load them as vectors."""

Model = Any
"""`schema.ModelT`; the generated module has no types."""

_DTYPES: dict[int, str] = {
    schema.TensorType.FLOAT32: "float32",
    schema.TensorType.FLOAT16: "float16",
    schema.TensorType.FLOAT64: "float64",
    schema.TensorType.INT64: "int64",
    schema.TensorType.INT32: "int32",
    schema.TensorType.INT16: "int16",
    schema.TensorType.INT8: "int8",
    schema.TensorType.INT4: "int4",
    schema.TensorType.UINT8: "uint8",
    schema.TensorType.BOOL: "bool",
    schema.TensorType.COMPLEX64: "complex64",
    schema.TensorType.STRING: "string",
}
_OPERATORS = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}


def read(path: Path) -> bytes:
    """A file's bytes, if they may be a model's.

    Raises:
        InputError: missing, empty, or of another format.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if content[4:8] != IDENTIFIER:
        raise InputError(f"{path} is not a LiteRT model (.tflite), or it is cut short")
    return content


def read_model(path: Path) -> Model:
    """A file as an object.

    Raises:
        InputError: missing, corrupt, or of another format.
    """
    return parse(read(path), str(path))


def parse(content: bytes, name: str = "the file") -> Model:
    """The content of a file, which errors call `name`, as an object; weights are views of it.

    Raises:
        InputError: corrupt.
    """
    try:
        model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
        graph = model.subgraphs[0]
        # What a file cut short or written over leaves: numbers of things that are not there.
        used = {model.buffers[tensor.buffer].offset for tensor in graph.tensors}
        used |= {model.operatorCodes[each.opcodeIndex].builtinCode for each in graph.operators}
        used |= {graph.tensors[index].type for each in graph.operators for index in (*each.inputs, *each.outputs)}
        used |= {graph.tensors[index].type for index in (*graph.inputs, *graph.outputs)}
    except (struct.error, IndexError, TypeError, ValueError, AttributeError, MemoryError, OverflowError) as error:
        raise InputError(f"{name} is not a valid LiteRT model, or it is cut short") from error
    for buffer in model.buffers:
        if buffer.offset > 1:  # large models keep their weights behind the flatbuffer
            buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    return model


def pack(model: Model) -> bytes:
    """An object as the content of a file."""
    builder = _Builder(1 << 20)
    builder.Finish(model.Pack(builder), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


class _Builder(flatbuffers.Builder):  # type: ignore[misc]
    """Aligns vectors of bytes, which the generated code forgets."""

    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> int:  # noqa: N802, N803 -- not our names
        position: int = super().StartVector(elemSize, numElems, ALIGNMENT if elemSize == 1 else alignment)
        return position


def operator(model: Model, each: Any) -> str:
    """The type of an operator, such as CONV_2D; a custom one's own name."""
    if is_custom(model, each):
        return text(model.operatorCodes[each.opcodeIndex].customCode) or "CUSTOM"
    code = _code(model, each)
    return str(_OPERATORS.get(code, f"operator {code}"))


def is_custom(model: Model, each: Any) -> bool:
    """Whether an operator is none of LiteRT's own."""
    return bool(_code(model, each) == schema.BuiltinOperator.CUSTOM)


def _code(model: Model, each: Any) -> int:
    """Codes were bytes once, and files from then have no other field."""
    code = model.operatorCodes[each.opcodeIndex]
    return int(max(code.builtinCode, code.deprecatedBuiltinCode))


def histogram(model: Model) -> dict[str, int]:
    """Occurrences by operator type, in all graphs of the file."""
    found = Counter(operator(model, each) for graph in model.subgraphs for each in graph.operators)
    return dict(sorted(found.items()))


def dtype(tensor: Any) -> str:
    """As numpy calls it."""
    return _DTYPES.get(tensor.type, f"type {tensor.type}")


def shape(tensor: Any) -> tuple[int, ...]:
    """Sizes along the axes."""
    return () if tensor.shape is None else tuple(map(int, tensor.shape))


def text(value: bytes | None) -> str:
    """Strings of a file are bytes."""
    return (value or b"").decode(errors="replace")


def constant(model: Model, tensor: Any) -> Array | None:
    """What a tensor holds in the file; None if it is computed, or of a type that numpy has not."""
    data = model.buffers[tensor.buffer].data
    if data is None or len(data) == 0 or dtype(tensor) in ("int4", "string") or dtype(tensor).startswith("type"):
        return None
    return np.frombuffer(np.asarray(data, np.uint8).tobytes(), dtype(tensor)).reshape(shape(tensor))


def dequantised(tensor: Any, value: Array) -> Array:
    """What the integers of a quantised tensor stand for, float32; any other value in float32."""
    parameters = tensor.quantization
    if parameters is None or parameters.scale is None or len(parameters.scale) == 0:
        return np.asarray(value, np.float32)
    scale = np.asarray(parameters.scale, np.float32)
    zero = np.asarray(parameters.zeroPoint, np.float32)
    if len(scale) > 1:
        axes = [1] * value.ndim
        axes[parameters.quantizedDimension] = -1
        scale, zero = scale.reshape(axes), zero.reshape(axes)
    return np.asarray((np.asarray(value, np.float32) - zero) * scale, np.float32)
