"""What of a saved package is compressed, read back from the file, and how near it is to the float32 build."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping

import numpy as np

from mobilemix.quantization.affine import Grid
from mobilemix.targets.base import Array
from mobilemix.targets.coreml.executor import RANGES, Executor
from mobilemix.targets.coreml.package import Constant, Operation, Output, Package
from mobilemix.targets.coreml.plan import Rounded
from mobilemix.targets.coreml.weights import spread

HALF = "_cast_fp16"
"""What coremltools appends to the names of values that it casts to float16."""

_ROUNDING, _LEAST = 2.0**-10, 2.0**-24
"""Of float16, relative and, where it is subnormal, absolute: the weight was rounded to it before, its form after."""


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight as the file has it.

    Attributes:
        dense: decompressed, float32.
        bits: of each number's integer or index.
        step: distance of its numbers, one for each weight; None where they are a palette's.
        palette: its numbers, (groups, entries); None where they have equal distances.
    """

    dense: Array
    bits: int
    step: Array | None
    palette: Array | None

    def excess(self, weight: Array, steps: float) -> Array:
        """How much further than allowed each number is from the float weight; above 0 is too far.

        Args:
            weight: float32, of the same shape.
            steps: how many a weight may be off by: half a one, or where weights are not rounded to the nearest, one.
                Of a palette it is the nearest number in any case.
        """
        error = np.abs(self.dense.astype(np.float64) - weight)
        if self.step is not None:
            error -= steps * self.step
        else:
            assert self.palette is not None
            groups = weight.reshape(len(self.palette), -1, 1).astype(np.float64)
            least = [np.abs(rows - own).min(1) for rows, own in zip(groups, self.palette, strict=True)]
            error -= np.concatenate(least).reshape(weight.shape)
        beyond: Array = error - _ROUNDING * np.abs(weight) - _LEAST
        return beyond


@dataclasses.dataclass(frozen=True)
class Compression:
    """What is compressed, by the names of the float32 build.

    Attributes:
        weights: by the constant.
        values: by the value.
        layers: names of the operations that read one of these.
        float_package: the package with decompressed weights as its constants.
    """

    weights: Mapping[str, Weight]
    values: Mapping[str, Rounded]
    layers: frozenset[str]
    float_package: Package


def compression(package: Package, build: Package) -> Compression:
    """Read what of `package` is compressed, and name it after the float32 build of the same program.

    What has no counterpart there is left out; then the two programs are not the same, which comparing them will show.
    """
    stored = _stored(package)
    producers = {output.name: operation for operation in package.operations for output in operation.outputs}
    counterparts = {operation.outputs[0].name: operation for operation in build.operations}
    weights: dict[str, Weight] = {}
    grids: dict[str, Grid] = {}
    readers: dict[str, set[str]] = defaultdict(set)
    layers = set()
    for operation in package.operations:
        own = counterparts.get(operation.outputs[0].name.removesuffix(HALF))
        for parameter, argument in operation.inputs.items() if own else ():
            assert own is not None
            for bound, other in zip(argument, own.inputs.get(parameter, ()), strict=False):
                if not isinstance(bound, str) or not isinstance(other, str):
                    continue
                if bound in stored:
                    weights[other] = stored[bound]
                elif (grid := _grid(producers.get(bound), producers)) is not None:
                    grids[other] = grid
                    readers[other].add(own.outputs[0].name)
                else:
                    continue
                layers.add(own.outputs[0].name)
    values = {name: Rounded(grid, frozenset(readers[name])) for name, grid in grids.items()}
    return Compression(weights, values, frozenset(layers), _decompressed(package, stored))


def _stored(package: Package) -> dict[str, Weight]:
    """Every compressed weight by the name of its decompressed value."""
    constants = {each.outputs[0].name: each.attributes["val"] for each in package.operations if each.type == "const"}
    parts = [each for each in package.operations if each.type == "const" or each.type.startswith("constexpr_")]
    alone = dataclasses.replace(package, operations=parts, inputs={}, outputs=())
    dense = dict(Executor(alone, rounding="fp16").values({}))
    return {
        operation.outputs[0].name: _weight(operation, constants, dense[operation.outputs[0].name])
        for operation in parts
        if operation.type != "const"
    }


def _weight(operation: Operation, constants: Mapping[str, Constant], dense: Array) -> Weight:
    given = dict(operation.attributes)
    for name, (bound, *_) in operation.inputs.items():
        given[name] = bound if isinstance(bound, Constant) else constants[bound]
    if "lut" in given:
        table = given["lut"].array.astype(np.float32)
        entries = table.shape[-2] if table.ndim > 1 else table.size
        return Weight(dense, entries.bit_length() - 1, None, table.reshape(-1, entries))
    scale = given["scale"].array.astype(np.float32)
    if scale.ndim < dense.ndim:
        shape = [1] * dense.ndim
        shape[int(given["axis"].array) if scale.ndim else 0] = scale.size
        scale = scale.reshape(shape)
    data = given.get("data") or given["quantized_data"]
    return Weight(dense, 4 if data.dtype == "int4" else 8, spread(scale, dense.shape), None)


def _grid(operation: Operation | None, producers: Mapping[str, Operation]) -> Grid | None:
    """The grid of a `dequantize` that stands behind a `quantize`."""
    if operation is None or operation.type != "dequantize":
        return None
    (integers,) = operation.inputs["input"]
    quantize = producers.get(integers) if isinstance(integers, str) else None
    if quantize is None or quantize.type != "quantize":
        return None
    scale, zero_point = (_constant(operation, name, producers).array for name in ("scale", "zero_point"))
    low, high = RANGES[quantize.outputs[0].dtype]
    return Grid(scale.astype(np.float32), zero_point.astype(np.int32), low, high)


def _constant(operation: Operation, name: str, producers: Mapping[str, Operation]) -> Constant:
    (bound,) = operation.inputs[name]
    return bound if isinstance(bound, Constant) else producers[bound].attributes["val"]


def _decompressed(package: Package, stored: Mapping[str, Weight]) -> Package:
    """The package with constants in the place of the operations that decompress them."""

    def plain() -> Iterator[Operation]:
        for operation in package.operations:
            if operation.type.startswith("constexpr_"):
                (output,) = operation.outputs
                yield _const(output, stored[output.name].dense)
            else:
                yield operation

    return dataclasses.replace(package, operations=list(plain()))


def _const(output: Output, dense: Array) -> Operation:
    content = dense.astype({"fp16": np.float16, "fp32": np.float32}[output.dtype])
    return Operation(
        "const", output.name, {}, (output,), {"val": Constant(output.dtype, content.shape, lambda: content)}
    )
