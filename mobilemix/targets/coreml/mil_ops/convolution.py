"""Convolutions and pools: windows over the spatial axes of (N, C, *D)."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.targets.coreml.mil_ops.base import channelwise, ints, rule

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}

Pads = list[tuple[int, int]]


def paddings(
    pad_type: str, pad: Tensor | None, sizes: Sequence[int], windows: Sequence[int], strides: Sequence[int]
) -> Pads:
    """(before, after) of each spatial axis.

    "same" gives ceil(size / stride) windows and puts an odd element after; "same_lower" puts it before.
    """
    match pad_type:
        case "valid":
            return [(0, 0)] * len(sizes)
        case "custom":
            flat = [0] * 2 * len(sizes) if pad is None else ints(pad)
            return list(zip(flat[::2], flat[1::2], strict=True))
        case "same" | "same_lower":
            totals = [
                max(0, (math.ceil(size / stride) - 1) * stride + window - size)
                for size, window, stride in zip(sizes, windows, strides, strict=True)
            ]
            halves = [(total // 2, total - total // 2) for total in totals]
            return halves if pad_type == "same" else [(after, before) for before, after in halves]
    raise ValueError(f"unknown pad_type '{pad_type}'")


def padded(x: Tensor, pads: Pads, value: float = 0.0) -> Tensor:
    """`x` with its last axes padded by (before, after) each; negative sizes crop."""
    flat = [size for pair in reversed(pads) for size in pair]
    return F.pad(x, flat, value=value) if any(flat) else x


@rule("conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """x (N, C, *D), weight (C', C / groups, *K); 1 to 3 spatial axes."""
    rank = x.ndim - 2
    stride = ints(strides) if strides is not None else [1] * rank
    dilation = ints(dilations) if dilations is not None else [1] * rank
    windows = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], dilation, strict=True)]
    pads = paddings(pad_type, pad, x.shape[2:], windows, stride)
    padding = [before for before, _ in pads]
    if any(before != after for before, after in pads):
        x, padding = padded(x, pads), [0] * rank
    count = int(groups) if groups is not None else 1
    result: Tensor = CONV[rank](x, weight, bias, stride, padding, dilation, count)
    return result


@rule("conv_transpose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    pad: Tensor | None = None,
    output_shape: Tensor | None = None,
    pad_type: str = "valid",
    strides: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | None = None,
) -> Tensor:
    """x (N, C, *D), weight (C, C' / groups, *K): the whole transposed convolution, cropped as `pad_type` says."""
    rank = x.ndim - 2
    stride = ints(strides) if strides is not None else [1] * rank
    dilation = ints(dilations) if dilations is not None else [1] * rank
    count = int(groups) if groups is not None else 1
    whole: Tensor = CONV_TRANSPOSE[rank](x, weight, None, stride, 0, 0, count, dilation)
    if pad_type == "same":
        sizes = [size * step for size, step in zip(x.shape[2:], stride, strict=True)]
        sizes = ints(output_shape)[2:] if output_shape is not None else sizes
        befores = [max(0, full - size) // 2 for full, size in zip(whole.shape[2:], sizes, strict=True)]
    else:
        pads = paddings(pad_type, pad, x.shape[2:], weight.shape[2:], stride)
        sizes = [full - sum(pair) for full, pair in zip(whole.shape[2:], pads, strict=True)]
        sizes = ints(output_shape)[2:] if output_shape is not None else sizes
        befores = [before for before, _ in pads]
    crops = [
        (-before, size + before - full) for full, size, before in zip(whole.shape[2:], sizes, befores, strict=True)
    ]
    cropped = padded(whole, crops)
    return cropped if bias is None else cropped + channelwise(bias, x.ndim)


def pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None,
    pad_type: str,
    pad: Tensor | None,
    ceil_mode: Tensor | None,
    reduce: Callable[[Tensor, Pads, Pads, list[int], list[int]], Tensor],
) -> Tensor:
    """Call `reduce(x, declared padding, padding that also completes the last window, kernel, strides)`."""
    kernel = ints(kernel_sizes)
    stride = ints(strides) if strides is not None else [1] * len(kernel)
    pads = paddings(pad_type.lower(), pad, x.shape[2:], kernel, stride)
    full = list(pads)
    if ceil_mode is not None and bool(ceil_mode):
        for axis, (size, window, step) in enumerate(zip(x.shape[2:], kernel, stride, strict=True)):
            before, after = pads[axis]
            count = (size + before + after - window + step - 1) // step + 1
            if (count - 1) * step >= size + (before + after) / 2 and before + after > 0:
                count -= 1
            full[axis] = (before, (count - 1) * step + window - size - before)
    return reduce(x, pads, full, kernel, stride)


@rule("avg_pool")
def avg_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    pad_type: str,
    strides: Tensor | None = None,
    pad: Tensor | None = None,
    exclude_padding_from_average: Tensor | None = None,
    ceil_mode: Tensor | None = None,
) -> Tensor:
    """Mean of each window; what ceil_mode adds never counts, padding counts unless it is excluded."""
    exclude = exclude_padding_from_average is not None and bool(exclude_padding_from_average)

    def mean(x: Tensor, pads: Pads, full: Pads, kernel: list[int], stride: list[int]) -> Tensor:
        average = AVG_POOL[len(kernel)]
        total: Tensor = average(padded(x, full), kernel, stride)
        if full == pads and not (exclude and any(map(any, pads))):
            return total
        counted = torch.ones((1, 1, *x.shape[2:]))
        counted = counted if exclude else padded(counted, pads, 1.0)
        rest = [(f[0] - p[0], f[1] - p[1]) for f, p in zip(full, pads, strict=True)]
        share: Tensor = average(padded(counted, full if exclude else rest), kernel, stride)
        return total / share

    return pool(x, kernel_sizes, strides, pad_type, pad, ceil_mode, mean)


@rule("max_pool")
def max_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    pad_type: str,
    strides: Tensor | None = None,
    pad: Tensor | None = None,
    ceil_mode: Tensor | None = None,
) -> Tensor:
    """Maximum of each window; padding never wins."""

    def maximum(x: Tensor, _: Pads, full: Pads, kernel: list[int], stride: list[int]) -> Tensor:
        result: Tensor = MAX_POOL[len(kernel)](padded(x, full, -math.inf), kernel, stride)
        return result

    return pool(x, kernel_sizes, strides, pad_type, pad, ceil_mode, maximum)


@rule("l2_pool")
def l2_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    pad_type: str,
    strides: Tensor | None = None,
    pad: Tensor | None = None,
    ceil_mode: Tensor | None = None,
) -> Tensor:
    """Root of the sum of squares of each window."""

    def norm(x: Tensor, _: Pads, full: Pads, kernel: list[int], stride: list[int]) -> Tensor:
        mean: Tensor = AVG_POOL[len(kernel)](padded(x * x, full), kernel, stride)
        return (mean * math.prod(kernel)).sqrt()

    return pool(x, kernel_sizes, strides, pad_type, pad, ceil_mode, norm)
