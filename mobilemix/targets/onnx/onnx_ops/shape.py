"""What moves numbers and computes none: shapes, slices, gathers."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.targets.onnx.onnx_ops.base import ints, rule


@rule("Reshape")
def reshape(x: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    """Elements in order, in another shape; a size may be −1, and 0 keeps the input's unless `allowzero`."""
    sizes = [x.shape[axis] if size == 0 and not allowzero else size for axis, size in enumerate(ints(shape))]
    return x.reshape(sizes)


@rule("Flatten")
def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """The axes before `axis` as one, the others as one."""
    return x.reshape(math.prod(x.shape[: axis if axis >= 0 else axis + x.ndim]), -1)


@rule("Transpose")
def transpose(x: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Axes in another order, reversed by default."""
    return x.permute(list(perm or reversed(range(x.ndim))))


@rule("Squeeze")
def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    """Without axes of size 1."""
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


@rule("Unsqueeze")
def unsqueeze(x: Tensor, axes: Tensor) -> Tensor:
    """With axes of size 1 where the result has `axes`."""
    rank = x.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in ints(axes)):
        x = x.unsqueeze(axis)
    return x


@rule("Expand")
def expand(x: Tensor, shape: Tensor) -> Tensor:
    """Broadcast with a shape, both ways."""
    sizes: Sequence[int] = torch.broadcast_shapes(x.shape, tuple(ints(shape)))  # type: ignore[no-untyped-call]
    return x.expand(sizes)


@rule("Tile")
def tile(x: Tensor, repeats: Tensor) -> Tensor:
    """Repeated along each axis."""
    return x.repeat(ints(repeats))


@rule("Shape")
def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """Sizes of the axes from start to end."""
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


@rule("Concat")
def concat(*values: Tensor, axis: int) -> Tensor:
    """One after another along an axis."""
    return torch.cat(values, axis)


@rule("Split")
def split(x: Tensor, sizes: Tensor | None = None, *, axis: int = 0, num_outputs: int = 0) -> Sequence[Tensor]:
    """Parts of the sizes, or of one size, the last one smaller."""
    shares = -(-x.shape[axis] // num_outputs) if sizes is None else ints(sizes)
    parts: Sequence[Tensor] = torch.split(x, shares, axis)
    return parts


@rule("Slice")
def slice_(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
    """From start to end in steps, which may go backwards, along each axis."""
    count = starts.numel()
    along = range(count) if axes is None else ints(axes)
    strides = [1] * count if steps is None else ints(steps)
    for start, end, axis, step in zip(ints(starts), ints(ends), along, strides, strict=True):
        size = x.shape[axis]
        first, last = (0, size) if step > 0 else (-1, size - 1)
        start, end = (place + size if place < 0 else place for place in (start, end))
        places = range(min(max(start, 0), last), min(max(end, first), last), step)
        x = x.index_select(axis, torch.tensor(places, dtype=torch.int64))
    return x


@rule("Gather")
def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Entries of an axis, in whose place are the axes of the indices; negative ones count from behind."""
    axis, size = axis % x.ndim, x.shape[axis]
    places = torch.where(indices < 0, indices + size, indices).to(torch.int64)
    return x.index_select(axis, places.flatten()).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@rule("GatherElements")
def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """One number for each index, from the same place in all other axes."""
    return x.gather(axis, torch.where(indices < 0, indices + x.shape[axis], indices).to(torch.int64))


@rule("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """A copy with other numbers at the indices, whose last axis counts x's leading ones."""
    if reduction not in ("none", "add"):
        raise NotImplementedError(f"ScatterND with reduction {reduction}")
    places = tuple(indices.to(torch.int64).unbind(-1))
    return x.index_put(places, updates, accumulate=reduction == "add")


@rule("Pad")
def pad(
    x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, *, mode: str = "constant"
) -> Tensor:
    """More numbers before and after along axes: a constant, the mirror image, the last number or the other end's."""
    sizes, count = ints(pads), pads.numel() // 2
    along = [axis % x.ndim for axis in (range(count) if axes is None else ints(axes))]
    for axis, before, after in zip(along, sizes[:count], sizes[count:], strict=True):
        moved = x.movedim(axis, -1)
        if mode == "constant":
            moved = F.pad(moved, [before, after], value=0 if value is None else value.item())
        elif before or after:
            kind = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode]
            lines = moved.reshape(1, -1, moved.shape[-1])
            moved = F.pad(lines, [before, after], mode=kind).reshape(*moved.shape[:-1], -1)
        x = moved.movedim(-1, axis)
    return x
