"""Read a saved .mlpackage (ML Program) back from disk: its program and its weights.

What is on disk, from the published `mlmodel` and MIL protobuf definitions and from the files that coremltools writes:

    Manifest.json                               names the root model among the items below Data/
    Data/com.apple.CoreML/model.mlmodel         a protobuf `Model`
    Data/com.apple.CoreML/weights/weight.bin    a 64-byte header, then for each tensor a 64-byte record
                                                (sentinel, data type, bytes, offset, padding bits) and its data,
                                                all little-endian and aligned to 64 bytes

Nothing in a package is trusted: every length and offset is checked before it is used, and no path leaves the package.
"""

import dataclasses
import functools
import json
import math
import struct
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from coremltools.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from mobilemix.errors import InputError

RECORD = struct.Struct("<IIQQQ32x")
"""A weight's record: sentinel, data type, size in bytes, offset of the data, unused bits of the last byte."""
SENTINEL = 0xDEADBEEF
ALIGNMENT = 64
MODEL_PATH = "@model_path"


class DType(NamedTuple):
    """How one MIL data type is stored."""

    name: str
    storage: Any
    bits: int
    blob: int | None
    """The type's code in a weight file's records; None for a type that is never stored there."""


DTYPES = {
    MIL_pb2.BOOL: DType("bool", np.bool_, 8, None),
    MIL_pb2.STRING: DType("string", np.str_, 0, None),
    MIL_pb2.FLOAT16: DType("fp16", np.float16, 16, 1),
    MIL_pb2.FLOAT32: DType("fp32", np.float32, 32, 2),
    MIL_pb2.FLOAT64: DType("fp64", np.float64, 64, None),
    MIL_pb2.INT4: DType("int4", np.int8, 4, 8),
    MIL_pb2.INT8: DType("int8", np.int8, 8, 4),
    MIL_pb2.INT16: DType("int16", np.int16, 16, 6),
    MIL_pb2.INT32: DType("int32", np.int32, 32, 14),
    MIL_pb2.INT64: DType("int64", np.int64, 64, None),
    MIL_pb2.UINT1: DType("uint1", np.uint8, 1, 9),
    MIL_pb2.UINT2: DType("uint2", np.uint8, 2, 10),
    MIL_pb2.UINT3: DType("uint3", np.uint8, 3, 12),
    MIL_pb2.UINT4: DType("uint4", np.uint8, 4, 11),
    MIL_pb2.UINT6: DType("uint6", np.uint8, 6, 13),
    MIL_pb2.UINT8: DType("uint8", np.uint8, 8, 3),
    MIL_pb2.UINT16: DType("uint16", np.uint16, 16, 7),
    MIL_pb2.UINT32: DType("uint32", np.uint32, 32, 15),
    MIL_pb2.UINT64: DType("uint64", np.uint64, 64, None),
}

COLOR_SPACE = FeatureTypes_pb2.ImageFeatureType.ColorSpace


class ValueType(NamedTuple):
    """Type of an input.

    Attributes:
        dtype: "fp16", "fp32", "int32" …, as MIL's cast operation spells them.
        shape: sizes, with None for a size that is only known at run time.
        image: the colour space ("RGB", "BGR", "GRAYSCALE", "GRAYSCALE_FLOAT16") of an input that Core ML fills from an
            image: pixel values in [0, 255] in (B, C, H, W), which the program itself scales; None for a plain tensor.
    """

    dtype: str
    shape: tuple[int | None, ...]
    image: str | None = None


class Output(NamedTuple):
    """One output of an operation, as the program declares it."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Constant:
    """A constant of the program, in the protobuf or in the weight file; `array` reads it.

    Attributes:
        dtype: MIL's name of the element type ("fp16", "uint4", "string" …).
        shape: its sizes; a list of n scalars has shape (n,).
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False, compare=False)
    file_offset: int | None = None
    """Where its data begins in the weight file; None for a constant in the protobuf."""

    @functools.cached_property
    def array(self) -> np.ndarray:
        """The values, read-only; types below a byte come as one (u)int8 each."""
        values = self.read().reshape(self.shape)
        values.flags.writeable = False
        return values


Argument = tuple[str | Constant, ...]
"""What is bound to one parameter: names of values and constants; more than one only where the parameter is a list."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of the program.

    Attributes:
        type: "conv", "const" …
        name: the operation's own name, for messages; empty if the program gives none.
        inputs: bound arguments by parameter name.
        outputs: what it defines.
        attributes: the rest (`val` of a constant, every parameter of an iOS 16 `constexpr_*`), without the name.
        blocks: how many nested blocks it has (control flow).
    """

    type: str
    name: str
    inputs: dict[str, Argument]
    outputs: tuple[Output, ...]
    attributes: dict[str, Constant]
    blocks: int = 0


@dataclasses.dataclass(frozen=True)
class Package:
    """An .mlpackage read from disk.

    Attributes:
        path: the package's folder.
        spec: the whole protobuf.
        operations: those of function "main", in execution order.
        inputs: main's inputs.
        outputs: names of main's outputs.
        opset: the operator set of the block that runs, "CoreML5" (iOS 15) … "CoreML8" (iOS 18).
    """

    path: Path
    spec: Model_pb2.Model
    operations: list[Operation]
    inputs: dict[str, ValueType]
    outputs: tuple[str, ...]
    opset: str

    @property
    def labels(self) -> tuple[str | int, ...] | None:
        """Class labels, in the order of the class probabilities; None for a program that is no classifier."""
        for operation in self.operations:
            if operation.type == "classify":
                (classes,) = operation.inputs["classes"]
                return tuple(classes.array.tolist()) if isinstance(classes, Constant) else None
        return None


def read_package(path: Path) -> Package:
    """Read the package at `path`; weights are checked here and read when they are used.

    Raises:
        InputError: not an ML Program package, or a malformed one.
    """
    try:
        return _read(path)
    except InputError as error:
        reason = "".join(each if each.isprintable() else "?" for each in str(error))
        raise InputError(f"'{path}' is not a Core ML package that can be read: {reason}") from error


def _read(path: Path) -> Package:
    model = _model_file(path)
    spec = Model_pb2.Model()
    try:
        spec.ParseFromString(model.read_bytes())
    except (DecodeError, OSError) as error:
        raise InputError(f"its model cannot be read ({error})") from error
    if spec.WhichOneof("Type") != "mlProgram":
        raise InputError("it is no ML Program; convert with convert_to='mlprogram'")
    if "main" not in spec.mlProgram.functions:
        raise InputError(f"no function 'main'; it has: {', '.join(sorted(spec.mlProgram.functions)) or 'none'}")
    function = spec.mlProgram.functions["main"]
    if function.opset not in function.block_specializations:
        raise InputError(f"function 'main' has no block for its operator set '{function.opset}'")
    block = function.block_specializations[function.opset]
    reader = _Reader(model.parent)
    operations = [reader.operation(proto) for proto in block.operations]
    package = Package(path, spec, operations, _inputs(spec, function), tuple(block.outputs), function.opset)
    _check_names(package)
    return package


def _model_file(path: Path) -> Path:
    try:
        manifest = json.loads((path / "Manifest.json").read_text(encoding="utf-8"))
        item = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("no readable Manifest.json") from error
    return _inside(path / "Data", str(item))


def _inside(folder: Path, name: str) -> Path:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or "\0" in name:
        raise InputError(f"the path '{name}' leads out of the package")
    return folder / relative


def _inputs(spec: Model_pb2.Model, function: MIL_pb2.Function) -> dict[str, ValueType]:
    images = {
        feature.name: COLOR_SPACE.Name(feature.type.imageType.colorSpace)
        for feature in spec.description.input
        if feature.type.WhichOneof("Type") == "imageType"
    }
    return {
        each.name: ValueType(*_tensor_type(each.type, f"input '{each.name}'"), image=images.get(each.name))
        for each in function.inputs
    }


def _tensor_type(proto: MIL_pb2.ValueType, what: str) -> tuple[str, tuple[int | None, ...]]:
    match proto.WhichOneof("type"):
        case "tensorType":
            tensor = proto.tensorType
            shape = tuple(
                size.constant.size if size.WhichOneof("dimension") == "constant" else None for size in tensor.dimensions
            )
            if len(shape) != tensor.rank:
                raise InputError(f"{what} declares rank {tensor.rank} and {len(shape)} sizes")
            return _dtype(tensor.dataType, what).name, shape
        case "dictionaryType":
            return "dict", ()
        case other:
            return str(other), ()


def _dtype(code: int, what: str) -> DType:
    if code not in DTYPES:
        raise InputError(f"{what} has the unknown data type {code}")
    return DTYPES[code]


def _check_names(package: Package) -> None:
    """Every name can be printed and is defined once, and before it is used; operations compute the outputs."""
    defined = set(package.inputs)
    computed = set()
    for operation in package.operations:
        what = f"{operation.type} '{operation.name}'"
        for parameter, argument in operation.inputs.items():
            for bound in argument:
                if isinstance(bound, str) and bound not in defined:
                    raise InputError(f"{what} reads '{bound}' ({parameter}), which nothing before it defines")
        for output in operation.outputs:
            if output.name in defined:
                raise InputError(f"'{output.name}' is defined twice")
            defined.add(output.name)
            if operation.type != "const":
                computed.add(output.name)
        if not all(map(str.isprintable, (what, *operation.inputs))):
            raise InputError(f"unprintable characters in a name of {what}")
    if not all(map(str.isprintable, defined)):
        raise InputError("unprintable characters in a name")
    for name in package.outputs:
        if name not in computed:
            raise InputError(f"no operation computes the output '{name}'")


class _Reader:
    """Turns protobuf messages into operations, with the weight files of one model folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, np.ndarray] = {}

    def operation(self, proto: MIL_pb2.Operation) -> Operation:
        named = "name" in proto.attributes
        name = "".join(proto.attributes["name"].immediateValue.tensor.strings.values) if named else ""
        what = f"{proto.type} '{name}'"
        operation = Operation(
            type=proto.type,
            name=name,
            inputs={key: self.argument(value, f"{what}, {key}") for key, value in proto.inputs.items()},
            outputs=tuple(Output(each.name, *_tensor_type(each.type, what)) for each in proto.outputs),
            attributes={
                key: self.constant(value, f"{what}, {key}") for key, value in proto.attributes.items() if key != "name"
            },
            blocks=len(proto.blocks),
        )
        if proto.type == "const":
            _check_constant(operation, what)
        return operation

    def argument(self, proto: MIL_pb2.Argument, what: str) -> Argument:
        if not proto.arguments:
            raise InputError(f"{what}: nothing is bound")
        return tuple(
            each.name if each.WhichOneof("binding") == "name" else self.constant(each.value, what)
            for each in proto.arguments
        )

    def constant(self, proto: MIL_pb2.Value, what: str) -> Constant:
        if proto.type.WhichOneof("type") == "listType":
            return self._list(proto, what)
        name, sizes = _tensor_type(proto.type, what)
        if proto.type.WhichOneof("type") != "tensorType" or None in sizes:
            raise InputError(f"{what}: a constant of type {name} is not supported")
        dtype = _dtype(proto.type.tensorType.dataType, what)
        shape = tuple(size for size in sizes if size is not None)
        if proto.WhichOneof("value") == "blobFileValue":
            return self._stored(proto.blobFileValue, dtype, shape, what)
        values = _immediate(proto.immediateValue.tensor, dtype, math.prod(shape), what)
        return Constant(dtype.name, shape, lambda: values)

    def _list(self, proto: MIL_pb2.Value, what: str) -> Constant:
        element = proto.type.listType.type.tensorType
        dtype = _dtype(element.dataType, what)
        parts = [_immediate(each.immediateValue.tensor, dtype, 1, what) for each in proto.immediateValue.list.values]
        if element.rank:
            raise InputError(f"{what}: a list of tensors is not supported")
        return Constant(dtype.name, (len(parts),), lambda: np.concatenate(parts))

    def _stored(self, blob: MIL_pb2.Value.BlobFileValue, dtype: DType, shape: tuple[int, ...], what: str) -> Constant:
        content = self._file(blob.fileName)
        if blob.offset % ALIGNMENT or blob.offset + RECORD.size > content.size:
            raise InputError(f"{what}: offset {blob.offset} is no record of a weight file of {content.size} bytes")
        sentinel, code, size, start, padding = RECORD.unpack(content[blob.offset : blob.offset + RECORD.size].tobytes())
        if sentinel != SENTINEL:
            raise InputError(f"{what}: the weight file's record at {blob.offset} does not begin with {SENTINEL:#x}")
        if code != dtype.blob:
            raise InputError(f"{what}: the weight file stores type {code}, the program declares {dtype.name}")
        count = math.prod(shape)
        if size != math.ceil(count * dtype.bits / 8) or padding not in (0, size * 8 - count * dtype.bits):
            raise InputError(f"{what}: {size} bytes are stored for {dtype.name} of shape {shape}")
        if start % ALIGNMENT or start + size > content.size:
            raise InputError(
                f"{what}: bytes {start} to {start + size} lie outside a weight file of {content.size} bytes"
            )
        return Constant(
            dtype.name, shape, lambda: _unpack(content[start : start + size].tobytes(), dtype, count), file_offset=start
        )

    def _file(self, name: str) -> np.ndarray:
        if name not in self.files:
            if not name.startswith(f"{MODEL_PATH}/"):
                raise InputError(f"the weight file '{name}' is not below {MODEL_PATH}")
            path = _inside(self.folder, name.removeprefix(f"{MODEL_PATH}/"))
            try:
                self.files[name] = np.memmap(path, dtype=np.uint8, mode="r")
            except (OSError, ValueError) as error:
                raise InputError(f"the weight file '{name}' cannot be read ({error})") from error
        return self.files[name]


def _check_constant(operation: Operation, what: str) -> None:
    if "val" not in operation.attributes or len(operation.outputs) != 1:
        raise InputError(f"{what} has no value or not one output")
    value, declared = operation.attributes["val"], operation.outputs[0]
    if (declared.dtype, declared.shape) not in ((value.dtype, value.shape), ("listType", ())):
        raise InputError(f"{what} is declared {declared.dtype} {declared.shape}, not {value.dtype} {value.shape}")


def _immediate(proto: MIL_pb2.TensorValue, dtype: DType, count: int, what: str) -> np.ndarray:
    field = proto.WhichOneof("value")
    if field is None:
        values: np.ndarray = np.zeros(0, dtype.storage)
    elif field == "bytes":
        data = proto.bytes.values
        if not dtype.bits or len(data) != math.ceil(count * dtype.bits / 8):
            raise InputError(f"{what}: {len(data)} bytes for {count} values of {dtype.name}")
        values = _unpack(data, dtype, count)
    else:
        held: Iterable[Any] = getattr(proto, field).values
        if (field == "strings") != (dtype.name == "string"):
            raise InputError(f"{what}: {field} given for {dtype.name}")
        try:
            values = np.array(list(held), dtype.storage)
        except (ValueError, OverflowError) as error:
            raise InputError(f"{what}: a value does not fit {dtype.name}") from error
    if values.size != count:
        raise InputError(f"{what}: {values.size} values for a shape of {count}")
    return values


def _unpack(data: bytes, dtype: DType, count: int) -> np.ndarray:
    """`count` values of `dtype`; those below a byte are packed from the least significant bit on, two's complement."""
    if dtype.bits >= 8:
        return np.frombuffer(data, np.dtype(dtype.storage).newbyteorder("<")).astype(dtype.storage)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little", count=count * dtype.bits)
    weights = 1 << np.arange(dtype.bits)
    if np.issubdtype(dtype.storage, np.signedinteger):
        weights[-1] = -weights[-1]
    return (bits.reshape(count, dtype.bits) @ weights).astype(dtype.storage)
