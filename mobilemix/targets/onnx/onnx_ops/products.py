"""Convolutions, pools and matrix products."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.targets.onnx.onnx_ops.base import channelwise, rule

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

Pads = list[tuple[int, int]]


def paddings(
    auto_pad: str, pads: Sequence[int] | None, sizes: Sequence[int], windows: Sequence[int], strides: Sequence[int]
) -> Pads:
    """(before, after) of each spatial axis; SAME gives ceil(size / stride) windows."""
    if auto_pad in ("NOTSET", "VALID"):
        rank = len(sizes)
        pads = pads if pads is not None and auto_pad == "NOTSET" else [0] * 2 * rank
        return list(zip(pads[:rank], pads[rank:], strict=True))
    totals = [
        max(0, (math.ceil(size / stride) - 1) * stride + window - size)
        for size, window, stride in zip(sizes, windows, strides, strict=True)
    ]
    halves = [(each // 2, each - each // 2) for each in totals]
    return halves if auto_pad == "SAME_UPPER" else [(after, before) for before, after in halves]


def padded(x: Tensor, pads: Pads, value: float = 0.0) -> Tensor:
    """`x` with its last axes padded by (before, after) each; negative sizes crop."""
    flat = [size for pair in reversed(pads) for size in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


def _extent(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    return [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]


@rule("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,  # noqa: ARG001, the weight has it
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """x (N, C, *D), weight (C', C / group, *K); 1 to 3 spatial axes."""
    rank = x.ndim - 2
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    around = paddings(auto_pad, pads, x.shape[2:], _extent(weight.shape[2:], dilation), stride)
    padding = [before for before, _ in around]
    if any(before != after for before, after in around):
        x, padding = padded(x, around), [0] * rank
    result: Tensor = CONV[rank](x, weight, bias, stride, padding, dilation, group)
    return result


@rule("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,  # noqa: ARG001, the weight has it
    output_padding: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """x (N, C, *D), weight (C, C' / group, *K): the whole transposed convolution without its padding."""
    if auto_pad not in ("NOTSET", "VALID"):
        raise NotImplementedError(f"auto_pad {auto_pad}")
    rank = x.ndim - 2
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    whole: Tensor = CONV_TRANSPOSE[rank](x, weight, None, stride, 0, 0, group, dilation)
    around = paddings(auto_pad, pads, whole.shape[2:], weight.shape[2:], stride)
    more = output_padding or [0] * rank
    cropped = padded(whole, [(-before, extra - after) for (before, after), extra in zip(around, more, strict=True)])
    return cropped if bias is None else cropped + channelwise(bias, x.ndim)


def _pool(
    x: Tensor,
    kernel: Sequence[int],
    auto_pad: str,
    ceil_mode: int,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    strides: Sequence[int] | None,
    reduce: Callable[[Pads, Pads, list[int], list[int]], Tensor],
) -> Tensor:
    """Call `reduce(padding, padding that also completes the last window, strides, dilations)`."""
    rank = len(kernel)
    stride, dilation = list(strides or [1] * rank), list(dilations or [1] * rank)
    windows = _extent(kernel, dilation)
    around = paddings(auto_pad, pads, x.shape[2:], windows, stride)
    full = list(around)
    if ceil_mode:
        for axis, (size, window, step) in enumerate(zip(x.shape[2:], windows, stride, strict=True)):
            before, after = around[axis]
            count = math.ceil((size + before + after - window) / step) + 1
            count -= (count - 1) * step >= size + before  # a window that begins in the padding behind
            full[axis] = before, (count - 1) * step + window - size - before
    return reduce(around, full, stride, dilation)


@rule("AveragePool")
def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Mean of each window; padding counts if `count_include_pad`, what `ceil_mode` adds never."""
    if dilations is not None and set(dilations) != {1}:
        raise NotImplementedError("dilations of AveragePool")

    def mean(around: Pads, full: Pads, stride: list[int], _: list[int]) -> Tensor:
        pool, kernel = AVERAGE_POOL[len(kernel_shape)], list(kernel_shape)
        ones = x.new_ones((1, 1, *x.shape[2:]))
        counted = padded(ones, around, 1.0) if count_include_pad else padded(ones, around)
        rest = [(0, last[1] - each[1]) for each, last in zip(around, full, strict=True)]
        result: Tensor = pool(padded(x, full), kernel, stride) / pool(padded(counted, rest), kernel, stride)
        return result

    return _pool(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides, mean)


@rule("MaxPool")
def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,  # noqa: ARG001, of the indices, which are not computed
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Maximum of each window; padding never wins."""

    def maximum(_: Pads, full: Pads, stride: list[int], dilation: list[int]) -> Tensor:
        pool = MAX_POOL[len(kernel_shape)]
        result: Tensor = pool(padded(x, full, -math.inf), list(kernel_shape), stride, 0, dilation)
        return result

    return _pool(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides, maximum)


@rule("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    """Mean over the spatial axes, which stay with size 1."""
    return x.mean(list(range(2, x.ndim)), keepdim=True)


@rule("MatMul")
def matmul(x: Tensor, y: Tensor) -> Tensor:
    """x y, as numpy broadcasts it."""
    return torch.matmul(x, y)


@rule("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,  # noqa: N803, the standard's names
    transB: int = 0,  # noqa: N803
) -> Tensor:
    """α A B + β C, A and B transposed where asked for."""
    product = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return product if c is None else product + beta * c


@rule("Einsum")
def einsum(*operands: Tensor, equation: str) -> Tensor:
    """Sum of products by a formula of indices."""
    return torch.einsum(equation, *operands)


@rule("CumSum")
def cumsum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Sums of all up to each; without it if exclusive, from the end if reverse."""
    along = int(axis)
    x = x.flip(along) if reverse else x
    summed = x.cumsum(along) - (x if exclusive else 0)
    return summed.flip(along) if reverse else summed


@rule("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels (N, C b², H, W) as pixels (N, C, H b, W b); b² is before C in the channels if DCR, else behind."""
    count, channels, height, width = x.shape
    depth = channels // blocksize**2
    shape = [blocksize, blocksize, depth] if mode == "DCR" else [depth, blocksize, blocksize]
    parts = x.reshape(count, *shape, height, width)
    order = [0, 3, 4, 1, 5, 2] if mode == "DCR" else [0, 1, 4, 2, 5, 3]
    return parts.permute(order).reshape(count, depth, height * blocksize, width * blocksize)
