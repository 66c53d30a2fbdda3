"""Inspection of a Core ML package of any origin."""

import math
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

from mobilemix import files
from mobilemix.inspection.report import ArtifactReport, Cost, Obstacle, Value, provenance
from mobilemix.models import flops
from mobilemix.targets.coreml.mil_ops import RULES
from mobilemix.targets.coreml.package import DTYPES, Constant, Operation, Output, Package, ValueType, read_package

Types = Mapping[str, Output | ValueType]

_VIEWS = frozenset({"const", "expand_dims", "identity", "reshape", "squeeze"})
_BITS = {dtype.name: dtype.bits for dtype in DTYPES.values()}


def inspect_package(path: Path) -> ArtifactReport:
    """Inspect the package.

    Raises:
        InputError: it is no ML Program package, or a malformed one.
    """
    package = read_package(path)
    operations = [each for each in package.operations if each.type != "const"]
    types: Types = {
        **package.inputs,
        **{output.name: output for each in package.operations for output in each.outputs},
    }
    constants = {each.outputs[0].name: each.attributes["val"] for each in package.operations if each.type == "const"}
    static = {*constants, *(each.outputs[0].name for each in operations if each.type.startswith("constexpr"))}
    weights = list(_weights(package))
    by_dtype: Counter[str] = Counter()
    for constant in weights:
        by_dtype[constant.dtype] += _bytes(constant)
    is_open = any(None in type_.shape for type_ in types.values())
    return ArtifactReport(
        path=str(path),
        form=f"ML Program for iOS {int(package.opset.removeprefix('CoreML')) + 10}",
        bytes=files.size(path),
        inputs=tuple(
            Value(name, f"{type_.image} image" if type_.image else type_.dtype, type_.shape)
            for name, type_ in package.inputs.items()
        ),
        outputs=tuple(Value(name, types[name].dtype, types[name].shape) for name in package.outputs),
        cost=Cost(
            operators=dict(Counter(each.type for each in operations).most_common()),
            weights=sum(math.prod(constant.shape) for constant in weights),
            weight_bytes=sum(by_dtype.values()),
            multiply_adds=None if is_open else sum(_multiply_adds(each, types, constants) for each in operations),
            moved_bytes=None
            if is_open
            else sum(_bytes(value) for each in operations for value in _activations(each, types, static)),
        ),
        weight_dtypes=dict(by_dtype.most_common()),
        provenance=provenance(package.spec.description.metadata.userDefined.get("mobilemix.provenance")),
        obstacles=tuple(_obstacles(operations)),
    )


def _weights(package: Package) -> Iterator[Constant]:
    """Constants with numbers; what several operations share in the weight file comes once."""
    seen: set[int] = set()
    for operation in package.operations:
        bound = (item for argument in operation.inputs.values() for item in argument if isinstance(item, Constant))
        for constant in (*operation.attributes.values(), *bound):
            if not _BITS.get(constant.dtype) or constant.file_offset in seen:
                continue
            if constant.file_offset is not None:
                seen.add(constant.file_offset)
            yield constant


def _obstacles(operations: list[Operation]) -> Iterator[Obstacle]:
    for name, count in Counter(each.type for each in operations if each.type not in RULES).items():
        yield Obstacle(name, "mobilemix verify", "its interpreter has no rule for the operation", count)
    for name, count in Counter(each.type for each in operations if each.blocks).items():
        yield Obstacle(name, "most accelerators", "control flow", count)


def _multiply_adds(operation: Operation, types: Types, constants: Mapping[str, Constant]) -> int:
    def shape(parameter: str, position: int = 0) -> tuple[int, ...]:
        bound = operation.inputs[parameter][position]
        return _sizes(bound if isinstance(bound, Constant) else types[bound])

    result = _sizes(operation.outputs[0])
    match operation.type:
        case "conv":
            return flops.convolution(result, shape("weight"))
        case "conv_transpose":
            return flops.transposed_convolution(shape("x"), shape("weight"))
        case "linear":
            return math.prod(result) * shape("weight")[-1]
        case "matmul":
            transposed = _constant(operation, "transpose_x", constants)
            return math.prod(result) * shape("x")[-2 if transposed is not None and transposed.array.item() else -1]
        case "einsum":
            equation = _constant(operation, "equation", constants)
            shapes = [shape("values", position) for position in range(len(operation.inputs["values"]))]
            return flops.einstein_sum(equation.array.item(), shapes) if equation is not None else 0
        case "scaled_dot_product_attention":
            query, key, value = shape("query"), shape("key"), shape("value")
            return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
        case _:
            return 0


def _constant(operation: Operation, parameter: str, constants: Mapping[str, Constant]) -> Constant | None:
    """What is bound to a parameter, in place or by the name of a constant; None if nothing is."""
    for bound in operation.inputs.get(parameter, ()):
        return bound if isinstance(bound, Constant) else constants.get(bound)
    return None


def _activations(operation: Operation, types: Types, weights: Container[str]) -> Iterator[Output | ValueType]:
    """What an operation reads and writes but for weights."""
    if operation.type in _VIEWS or operation.type.startswith("constexpr"):
        return
    names = [item for argument in operation.inputs.values() for item in argument if isinstance(item, str)]
    yield from (types[name] for name in names if name not in weights)
    yield from operation.outputs


def _sizes(value: Constant | Output | ValueType) -> tuple[int, ...]:
    return tuple(size for size in value.shape if size is not None)


def _bytes(value: Constant | Output | ValueType) -> int:
    return math.ceil(math.prod(_sizes(value)) * _BITS.get(value.dtype, 0) / 8)
