"""Integers that stand for real numbers: x ≈ (q − zero point) · scale, and sums of their products, which are exact."""

from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch import Tensor

from mobilemix.targets.onnx.onnx_ops.base import channelwise, rule
from mobilemix.targets.onnx.onnx_ops.products import conv

FLOAT8 = {
    onnx.TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    onnx.TensorProto.FLOAT8E5M2: torch.float8_e5m2,
}
INTEGERS = {
    onnx.TensorProto.INT8: torch.int8,
    onnx.TensorProto.UINT8: torch.uint8,
    onnx.TensorProto.INT16: torch.int16,
    onnx.TensorProto.INT32: torch.int32,
}


def _spread(values: Tensor, like: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or a zero point for each number: of the whole tensor, of an axis, or of blocks along it."""
    if block_size:
        return values.repeat_interleave(block_size, axis).narrow(axis, 0, like.shape[axis])
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * like.ndim
    shape[axis] = -1
    return values.reshape(shape)


@rule("QuantizeLinear")
def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: int = 1,
) -> Tensor:
    """Nearest multiples of the scale, ties to even, moved by the zero point, as far as the type goes.

    The quotient is a float32 whatever the working type is: pixels lie on a grid as well, and its ties have to be ties.
    """
    dtype = (INTEGERS | FLOAT8)[output_dtype] if output_dtype else torch.uint8
    dtype = zero_point.dtype if zero_point is not None else dtype
    multiples = x.to(torch.float32) / _spread(scale, x, axis, block_size).to(torch.float32)
    if dtype.is_floating_point:
        if not saturate:
            raise NotImplementedError("QuantizeLinear that does not saturate")
        largest = torch.finfo(dtype).max
        return multiples.clamp(-largest, largest).to(dtype)
    numbers = multiples.round()
    if zero_point is not None:
        numbers = numbers + _spread(zero_point, x, axis, block_size)
    return numbers.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max).to(dtype)


@rule("DequantizeLinear")
def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
) -> Tensor:
    """(q − zero point) · scale."""
    numbers = x.to(scale.dtype)
    if zero_point is not None:
        numbers = numbers - _spread(zero_point, x, axis, block_size).to(scale.dtype)
    return numbers * _spread(scale, x, axis, block_size)


@rule("DynamicQuantizeLinear")
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 over the range of x and 0, with its scale and zero point."""
    low, high = (each.to(torch.float32) for each in (x.amin().clamp(max=0), x.amax().clamp(min=0)))
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero_point = (-low / scale).round().clamp(0, 255).to(torch.uint8)
    return quantize_linear(x, scale, zero_point), scale.to(x.dtype), zero_point


@rule("MatMulInteger")
def matmul_integer(
    a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None
) -> Tensor:
    """(A − a's zero point, of all or of rows) (B − b's, of all or of columns), in int32."""
    left, right = a.to(torch.float64), b.to(torch.float64)  # exact to 2^53, and has kernels
    if a_zero_point is not None:
        left = left - (a_zero_point.unsqueeze(-1) if a_zero_point.ndim else a_zero_point).to(torch.float64)
    if b_zero_point is not None:
        right = right - (b_zero_point.unsqueeze(-2) if b_zero_point.ndim > 1 else b_zero_point).to(torch.float64)
    return (left @ right).to(torch.int32)


@rule("ConvInteger")
def conv_integer(
    x: Tensor,
    weight: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """`Conv` of x − its zero point, which is what padding holds, and weight − its, of all or of output channels."""
    attributes: dict[str, Any] = {"kernel_shape": kernel_shape, "pads": pads, "strides": strides}
    values, filters = x.to(torch.float64), weight.to(torch.float64)
    if x_zero_point is not None:
        values = values - x_zero_point.to(torch.float64)
    if w_zero_point is not None:
        filters = filters - (channelwise(w_zero_point, weight.ndim + 1) if w_zero_point.ndim else w_zero_point).to(
            torch.float64
        )
    return conv(values, filters, auto_pad=auto_pad, dilations=dilations, group=group, **attributes).to(torch.int32)
