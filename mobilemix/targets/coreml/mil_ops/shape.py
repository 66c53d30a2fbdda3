"""Operations that only move values: shapes, orders, joins and parts."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.targets.coreml.mil_ops.base import Tensors, always, ints, rule
from mobilemix.targets.coreml.mil_ops.convolution import padded


@rule("reshape")
def reshape(x: Tensor, shape: Tensor) -> Tensor:
    """To `shape`, where −1 is inferred and 0 is the size of x at the same place from the right."""
    target = ints(shape)
    for back in range(1, len(target) + 1):
        if target[-back] == 0:
            target[-back] = x.shape[-back] if back <= x.ndim else 1
    return x.reshape(target)


@rule("reshape_like")
def reshape_like(x: Tensor, ref_tensors: Tensors, begins: Tensors, ends: Tensors, end_masks: Tensors) -> Tensor:
    """To the joined parts [begin:end] of the references' shapes; a masked end is the last axis."""
    target: list[int] = []
    for reference, begin, end, mask in zip(ref_tensors, begins, ends, end_masks, strict=True):
        target += reference.shape[int(begin) : None if mask else int(end)]
    return x.reshape(target)


@rule("expand_dims")
def expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    """Axes of size 1 at the places `axes` of the result."""
    rank = x.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in ints(axes)):
        x = x.unsqueeze(axis)
    return x


@rule("squeeze")
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Without `axes` (all by default) where they have size 1."""
    return x.squeeze() if axes is None else x.squeeze(ints(axes))


@rule("flatten2d")
def flatten2d(x: Tensor, axis: Tensor | int = 1) -> Tensor:
    """Axes before and from `axis` on, multiplied out."""
    cut = int(axis)
    return x.reshape(math.prod(x.shape[:cut]), math.prod(x.shape[cut:]))


@rule("transpose")
def transpose(x: Tensor, perm: Tensor) -> Tensor:
    """Axis i of the result is axis perm[i] of x."""
    return x.permute(ints(perm))


@rule("shape", result=always("int32"))
def shape(x: Tensor) -> Tensor:
    """The sizes of x."""
    return torch.tensor(x.shape)


@rule("concat")
def concat(values: Tensors, axis: Tensor, interleave: Tensor | bool = False) -> Tensor:
    """Joined along `axis`, or dealt out in turn."""
    if values[0].ndim == 0:
        return torch.stack(list(values))
    along = int(axis) % values[0].ndim
    if interleave:
        return torch.stack(list(values), along + 1).flatten(along, along + 1)
    return torch.cat(list(values), along)


@rule("stack")
def stack(values: Tensors, axis: Tensor) -> Tensor:
    """Joined along a new axis."""
    return torch.stack(list(values), int(axis))


@rule("split")
def split(
    x: Tensor, axis: Tensor, num_splits: Tensor | None = None, split_sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Parts of `split_sizes`, or `num_splits` equal ones."""
    if split_sizes is not None:
        return x.split_with_sizes(ints(split_sizes), int(axis))
    if num_splits is None:
        raise ValueError("neither num_splits nor split_sizes is given")
    size, rest = divmod(x.shape[int(axis)], int(num_splits))
    if rest:
        raise ValueError(f"{x.shape[int(axis)]} does not divide into {int(num_splits)}")
    return x.split_with_sizes([size] * int(num_splits), int(axis))


@rule("tile")
def tile(x: Tensor, reps: Tensor) -> Tensor:
    """Repeated reps[i] times along axis i."""
    return x.tile(ints(reps))


@rule("reverse")
def reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Backwards along `axes` (all by default)."""
    return x.flip(ints(axes) if axes is not None else list(range(x.ndim)))


@rule("reverse_sequence")
def reverse_sequence(x: Tensor, lengths: Tensor, seq_axis: Tensor | int = 0, batch_axis: Tensor | int = 0) -> Tensor:
    """Each sample's first lengths[i] elements along `seq_axis`, backwards."""
    result = x.clone()
    samples = result.movedim((int(batch_axis), int(seq_axis)), (0, 1))
    for sample, length in zip(samples, ints(lengths), strict=True):
        sample[:length] = sample[:length].flip(0).clone()
    return result


@rule("pad")
def pad(x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | float = 0.0) -> Tensor:
    """(before, after) of each of the last axes."""
    flat = ints(pad)
    pairs = list(zip(flat[::2], flat[1::2], strict=True))
    if mode == "constant":
        return padded(x, pairs, float(constant_val))
    if mode not in ("reflect", "replicate"):
        raise ValueError(f"unknown mode '{mode}'")
    for axis, (before, after) in enumerate(pairs, x.ndim - len(pairs)):
        size = x.shape[axis]
        if mode == "reflect" and max(before, after) >= size:
            raise ValueError(f"cannot reflect {max(before, after)} of {size} values")
        index = torch.arange(-before, size + after)
        index = index.clamp(0, size - 1) if mode == "replicate" else size - 1 - (size - 1 - index.abs()).abs()
        x = x.index_select(axis, index)
    return x


@rule("crop")
def crop(x: Tensor, crop_height: Tensor, crop_width: Tensor) -> Tensor:
    """Without the first and last rows and columns."""
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


@rule("sliding_windows")
def sliding_windows(x: Tensor, axis: Tensor, size: Tensor, stride: Tensor | int = 1) -> Tensor:
    """Windows of `size` along `axis`; the window's own axis comes next."""
    along = int(axis) % x.ndim
    return x.unfold(along, int(size), int(stride)).movedim(-1, along + 1)


@rule("pixel_shuffle")
def pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    """(N, C f², H, W) to (N, C, H f, W f), the block innermost in the channels."""
    return F.pixel_shuffle(x, int(upscale_factor))


@rule("pixel_unshuffle")
def pixel_unshuffle(x: Tensor, downscale_factor: Tensor) -> Tensor:
    """(N, C, H f, W f) to (N, C f², H, W), the block innermost in the channels."""
    return F.pixel_unshuffle(x, int(downscale_factor))


@rule("depth_to_space")
def depth_to_space(x: Tensor, block_size: Tensor) -> Tensor:
    """(N, b² C, H, W) to (N, C, H b, W b), the block outermost in the channels."""
    n, c, h, w = x.shape
    b = int(block_size)
    return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


@rule("space_to_depth")
def space_to_depth(x: Tensor, block_size: Tensor) -> Tensor:
    """(N, C, H b, W b) to (N, b² C, H, W), the block outermost in the channels."""
    n, c, h, w = x.shape
    b = int(block_size)
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


def _pairs(values: Tensor) -> Sequence[tuple[int, int]]:
    return [(int(before), int(after)) for before, after in values.tolist()]


@rule("space_to_batch")
def space_to_batch(x: Tensor, block_shape: Tensor, paddings: Tensor) -> Tensor:
    """Padded (N, C, H a, W b) to (a b N, C, H, W), the block outermost in the batch."""
    x = padded(x, list(_pairs(paddings)))
    n, c, h, w = x.shape
    a, b = ints(block_shape)
    return x.reshape(n, c, h // a, a, w // b, b).permute(3, 5, 0, 1, 2, 4).reshape(n * a * b, c, h // a, w // b)


@rule("batch_to_space")
def batch_to_space(x: Tensor, block_shape: Tensor, crops: Tensor) -> Tensor:
    """(a b N, C, H, W) to (N, C, H a, W b), cropped; the block is outermost in the batch."""
    n, c, h, w = x.shape
    a, b = ints(block_shape)
    n //= a * b
    x = x.reshape(a, b, n, c, h, w).permute(2, 3, 4, 0, 5, 1).reshape(n, c, h * a, w * b)
    return padded(x, [(-before, -after) for before, after in _pairs(crops)])
