"""Constants, conversions and loops."""

from collections.abc import Sequence

import onnx
import torch
from torch import Tensor, nn

from mobilemix.targets.onnx.onnx_ops.base import rule

DTYPES = {
    onnx.TensorProto.BOOL: torch.bool,
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
    onnx.TensorProto.INT64: torch.int64,
}
NARROW = {onnx.TensorProto.FLOAT16: torch.float16, onnx.TensorProto.BFLOAT16: torch.bfloat16}
WIDE = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)


@rule("Constant")
def constant(
    *,
    wide: torch.dtype,
    value: Tensor | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
) -> Tensor:
    """One of the attributes."""
    if value is not None:
        return value
    whole = value_ints if value_int is None else value_int
    if whole is not None:
        return torch.tensor(whole, dtype=torch.int64)
    return torch.tensor(value_floats if value_float is None else value_float, dtype=wide)


@rule("ConstantOfShape")
def constant_of_shape(shape: Tensor, *, wide: torch.dtype, value: Tensor | None = None) -> Tensor:
    """One number, 0 by default, everywhere."""
    number = torch.zeros((), dtype=wide) if value is None else value.reshape(())
    return number.expand(shape.tolist())


@rule("Range")
def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """From start to before the limit in steps."""
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@rule("Cast")
def cast(x: Tensor, *, wide: torch.dtype, to: int, saturate: int = 1) -> Tensor:  # noqa: ARG001, of 8-bit floats
    """The same numbers in another type; 16-bit floats are rounded to and held in the working type."""
    if to in NARROW:
        return x.to(NARROW[to]).to(wide)
    return x.to(wide if to in WIDE else DTYPES[to])


@rule("Scan")
def scan(*values: Tensor, body: nn.Module, around: Sequence[Tensor], num_scan_inputs: int) -> list[Tensor]:
    """Run the body once a step: from the states and a slice of each sequence to the new states and outputs.

    Args:
        values: initial states, then the sequences, over their first axis.
        body: takes states, slices, and what it reads of the graph around it.
        around: the latter.
        num_scan_inputs: number of sequences.

    Returns:
        The last states, then each step's outputs, stacked.
    """
    count = len(values) - num_scan_inputs
    states, sequences = list(values[:count]), values[count:]
    steps = []
    for slices in zip(*(sequence.unbind(0) for sequence in sequences), strict=True):
        results = body(*states, *slices, *around)
        states = list(results[:count])
        steps.append(results[count:])
    return [*states, *(torch.stack(outputs) for outputs in zip(*steps, strict=True))]
