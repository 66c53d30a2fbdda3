"""Carry out a plan: on a package on disk, by coremltools, and on one in memory, for the executor."""

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813, its name everywhere
from coremltools.converters.mil.converter import mil_convert
from coremltools.converters.mil.frontend import _utils as constexpr
from coremltools.converters.mil.frontend.milproto import load as milproto
from coremltools.converters.mil.mil import Operation as MilOperation

from mobilemix.quantization.affine import Grid
from mobilemix.targets.base import Array
from mobilemix.targets.coreml.convert import quiet, unhindered, write_package
from mobilemix.targets.coreml.package import Argument, Constant, Operation, Output, Package
from mobilemix.targets.coreml.plan import Plan, Rounded
from mobilemix.targets.coreml.weights import Dense, Form, Integers

DEQUANTIZED = "_dequantized"
"""What the name of a rounded value ends in."""


def compress_package(source: Path, plan: Plan, destination: Path) -> None:
    """Write the float package `source` again, compressed; `destination` does not exist.

    Before:   x → conv(weight)
    After:    x → quantize → dequantize → conv(constexpr_…(weight in few bits, its scales or palettes))

    coremltools' own functions for this run all its passes a second time, which changes the program besides. Here it is
    read, changed in these places and written.
    """
    with tempfile.TemporaryDirectory() as folder, quiet(), unhindered():
        model = ct.models.MLModel(str(source), skip_model_load=True)
        specification = model.get_spec()
        version = specification.specificationVersion
        program = milproto.load(specification, version, file_weights_dir=model.weights_dir)
        main = program.functions["main"]
        with main:
            _round(main, plan)
            _compress(main, plan)
        compressed = mil_convert(
            program,
            convert_from="milinternal",
            convert_to="mlprogram",
            compute_units=model.compute_unit,
            specification_version=version,
            model_description=specification.description,
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
            package_dir=str(Path(folder, "model.mlpackage")),
        )
        write_package(compressed.get_spec(), Path(compressed.weights_dir), destination)


def _compress(main: Any, plan: Plan) -> None:
    """Put the compressed form in the place of each weight."""
    for operation in list(main.operations):
        (weight, *_) = operation.outputs
        if operation.op_type == "const" and weight.name in plan.weights:
            compressed = _constexpr(plan.weights[weight.name], operation)
            main.replace_uses_of_var_after_op(
                anchor_op=operation, old_var=weight, new_var=compressed, no_check_var_types=True
            )
            main.remove_ops([operation])


def _constexpr(form: Form, weight: MilOperation) -> Any:
    """The operation of the weight's operator set that decompresses it."""
    name = f"{weight.outputs[0].name}_compressed"
    if isinstance(form, Integers):
        return constexpr._construct_constexpr_dequant_op(
            form.data, np.int8(0), form.scale, axis=0, name=name, before_op=weight
        )
    return constexpr._construct_constexpr_lut_op(form.indices, form.tables, name=name, before_op=weight)


def _round(main: Any, plan: Plan) -> None:
    """Put a pair in front of the first reader of each rounded value, for all its readers."""
    pairs: dict[str, Any] = {}
    for operation in list(main.operations):
        reads = operation.inputs.get("x")
        rounded = plan.values.get(getattr(reads, "name", ""))
        if rounded is not None and operation.outputs[0].name in rounded.readers:
            if reads.name not in pairs:
                pairs[reads.name] = _pair(reads, rounded.grid, operation)
            operation.set_inputs(x=pairs[reads.name])


def _pair(value: Any, grid: Grid, reader: MilOperation) -> Any:
    terms = {"scale": grid.scale.astype(np.float16), "zero_point": grid.zero_point.astype(grid.dtype)}
    integers = mb.quantize(
        input=value,
        **terms,
        output_dtype=np.dtype(grid.dtype).name,
        name=f"{value.name}_quantized",
        before_op=reader,
    )
    return mb.dequantize(input=integers, **terms, name=f"{value.name}{DEQUANTIZED}", before_op=reader)


class Compressed(Protocol):
    """A plan, or what was read back of one."""

    @property
    def weights(self) -> Mapping[str, Dense]:
        """What stands for weights, by the names of their constants."""

    @property
    def values(self) -> Mapping[str, Rounded]:
        """What is rounded, by name."""


def simulated(package: Package, compressed: Compressed) -> Package:
    """A package that computes in float what compression leaves of the weights and the values of a float one."""
    return dataclasses.replace(package, operations=list(_simulated(package, compressed)))


def _simulated(package: Package, compressed: Compressed) -> Iterator[Operation]:
    weights, values = compressed.weights, compressed.values
    declared = {output.name: output for operation in package.operations for output in operation.outputs}
    declared |= {name: Output(name, each.dtype, each.shape) for name, each in package.inputs.items()}
    pairs: set[str] = set()
    for operation in package.operations:
        name = operation.outputs[0].name
        (read, *_) = operation.inputs.get("x", (None,))
        if operation.type == "const" and name in weights:
            float_ = operation.attributes["val"]
            held = dataclasses.replace(_held(weights[name].dense, float_.dtype), file_offset=float_.file_offset)
            yield dataclasses.replace(operation, attributes={"val": held})
        elif isinstance(read, str) and read in values and name in values[read].readers:
            if read not in pairs:
                pairs.add(read)
                yield from _fake(declared[read], values[read].grid)
            yield dataclasses.replace(operation, inputs={**operation.inputs, "x": (f"{read}{DEQUANTIZED}",)})
        else:
            yield operation


def _fake(value: Output, grid: Grid) -> Iterator[Operation]:
    """The two operations of a pair."""
    dtype = np.dtype(grid.dtype).name
    integers = Output(f"{value.name}_quantized", dtype, value.shape)
    result = Output(f"{value.name}{DEQUANTIZED}", value.dtype, value.shape)
    terms: dict[str, Argument] = {
        "scale": (_held(grid.scale, value.dtype),),
        "zero_point": (_held(grid.zero_point, dtype),),
    }
    output_dtype = Constant("string", (), lambda: np.array(dtype))
    reads = {"input": (value.name,), **terms, "output_dtype": (output_dtype,)}
    yield Operation("quantize", integers.name, reads, (integers,), {})
    yield Operation("dequantize", result.name, {"input": (integers.name,), **terms}, (result,), {})


def _held(content: Array, dtype: str) -> Constant:
    return Constant(dtype, content.shape, lambda: np.asarray(content))
