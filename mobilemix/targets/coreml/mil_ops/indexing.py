"""Slices, gathers, scatters and orders along an axis."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mobilemix.targets.coreml.mil_ops.base import DTypes, always, ints, rule

Index = tuple[Any, ...]


def _slices(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None,
    begin_mask: Tensor | None,
    end_mask: Tensor | None,
    squeeze_mask: Tensor | None,
) -> Index:
    """numpy's index: a masked bound is open, a squeezed axis is indexed at its begin."""
    rank = x.ndim
    steps = ints(stride) if stride is not None else [1] * rank
    masks = [ints(mask) if mask is not None else [0] * rank for mask in (begin_mask, end_mask, squeeze_mask)]
    index: list[int | slice] = []
    for first, last, step, no_first, no_last, squeezed in zip(ints(begin), ints(end), steps, *masks, strict=True):
        if squeezed:
            index.append(0 if no_first else first)
        else:
            index.append(slice(None if no_first else first, None if no_last else last, step))
    return tuple(index)


@rule("slice_by_index")
def slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    """x[begin:end:stride] along every axis."""
    index = list(_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask))
    for axis, part in enumerate(index):
        if isinstance(part, slice) and (part.step or 1) < 0:  # which torch's own slices cannot do
            x = x.index_select(axis, torch.tensor(range(*part.indices(x.shape[axis])), dtype=torch.long))
            index[axis] = slice(None)
    return x[tuple(index)]


@rule("slice_update")
def slice_update(
    x: Tensor,
    update: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    """`x` with x[begin:end:stride] replaced."""
    positions = torch.arange(x.numel()).reshape(x.shape)
    places = slice_by_index(positions, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    return x.flatten().index_copy(0, places.flatten(), update.expand(places.shape).flatten()).reshape(x.shape)


@rule("slice_by_size")
def slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    """`size` values from `begin` on along every axis; −1 takes the rest."""
    for axis, (first, count) in enumerate(zip(ints(begin), ints(size), strict=True)):
        first = first % x.shape[axis] if first < 0 else first
        x = x.narrow(axis, first, x.shape[axis] - first if count == -1 else count)
    return x


def _checked(indices: Tensor, size: int) -> Tensor:
    """`indices` from 0 on; negative ones count from the end."""
    if indices.numel() and not -size <= int(indices.min()) <= int(indices.max()) < size:
        raise IndexError(f"indices from {int(indices.min())} to {int(indices.max())} for {size} values")
    return torch.where(indices < 0, indices + size, indices)


@rule("gather")
def gather(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | int = 0,
    batch_dims: Tensor | int = 0,
    validate_indices: Tensor | bool = False,  # noqa: ARG001 always validated
) -> Tensor:
    """Axis `axis` of x replaced by the axes of `indices`; the first `batch_dims` axes go together."""
    along, batch = int(axis) % x.ndim, int(batch_dims)
    where = _checked(indices, x.shape[along])
    if batch == 0:
        taken = x.index_select(along, where.flatten())
        return taken.reshape(*x.shape[:along], *indices.shape, *x.shape[along + 1 :])
    parts = [
        gather(sample, place, along - batch)
        for sample, place in zip(x.flatten(0, batch - 1), where.flatten(0, batch - 1), strict=True)
    ]
    return torch.stack(parts).reshape(*x.shape[:batch], *parts[0].shape)


@rule("gather_along_axis")
def gather_along_axis(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | int = 0,
    validate_indices: Tensor | bool = False,  # noqa: ARG001
) -> Tensor:
    """x[…, indices[…, i, …], …]: one place along `axis` for each output value."""
    return x.gather(int(axis), _checked(indices, x.shape[int(axis)]))


def _coordinates(x: Tensor, indices: Tensor, batch: int) -> Index:
    """The last axis of `indices` as an index into the axes of x after the first `batch`."""
    depth = indices.shape[-1]
    places = [_checked(indices[..., i], x.shape[batch + i]) for i in range(depth)]
    grids = torch.meshgrid([torch.arange(size) for size in x.shape[:batch]], indexing="ij") if batch else ()
    spread = [grid.reshape(*grid.shape, *[1] * (indices.ndim - 1 - batch)) for grid in grids]
    return (*spread, *places)


@rule("gather_nd")
def gather_nd(
    x: Tensor,
    indices: Tensor,
    batch_dims: Tensor | int = 0,
    validate_indices: Tensor | bool = False,  # noqa: ARG001
) -> Tensor:
    """x at the coordinates along the last axis of `indices`."""
    return x[_coordinates(x, indices, int(batch_dims))]


SCATTER: dict[str, Any] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


def _scattered(data: Tensor, index: Index, updates: Tensor, mode: str) -> Tensor:
    result = data.clone()
    places = tuple(each.numpy() if isinstance(each, Tensor) else each for each in index)
    if mode == "update":
        result.numpy()[places] = updates.numpy()
    elif mode in SCATTER:
        SCATTER[mode].at(result.numpy(), places, updates.numpy())
    else:
        raise ValueError(f"unknown mode '{mode}'")
    return result


@rule("scatter")
def scatter(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Tensor | int = 0,
    mode: str = "add",
    validate_indices: Tensor | bool = False,  # noqa: ARG001
) -> Tensor:
    """`data` with the slices at `indices` of `axis` updated."""
    along = int(axis) % data.ndim
    index = (*[slice(None)] * along, _checked(indices, data.shape[along]))
    return _scattered(data, index, updates, mode)


@rule("scatter_along_axis")
def scatter_along_axis(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    axis: Tensor | int = 0,
    mode: str = "add",
    validate_indices: Tensor | bool = False,  # noqa: ARG001
) -> Tensor:
    """`data` with one value along `axis` updated for each of `indices`."""
    along = int(axis) % data.ndim
    index = list(torch.meshgrid([torch.arange(size) for size in indices.shape], indexing="ij"))
    index[along] = _checked(indices, data.shape[along])
    return _scattered(data, tuple(index), updates, mode)


@rule("scatter_nd")
def scatter_nd(
    data: Tensor,
    indices: Tensor,
    updates: Tensor,
    mode: str = "add",
    validate_indices: Tensor | bool = False,  # noqa: ARG001
) -> Tensor:
    """`data` updated at the coordinates along the last axis of `indices`."""
    return _scattered(data, _coordinates(data, indices, 0), updates, mode)


@rule("argsort", result=always("int32"))
def argsort(x: Tensor, axis: Tensor | int = -1, ascending: Tensor | bool = False) -> Tensor:
    """The order along `axis`, largest first by default."""
    return torch.argsort(x, dim=int(axis), descending=not ascending, stable=True)


def _topk_types(dtypes: DTypes, values: Mapping[str, Any]) -> str | tuple[str, ...]:
    indices = values.get("return_indices", True)
    return (dtypes["x"], values.get("output_indices_dtype", "int32")) if indices else dtypes["x"]


@rule("topk", result=_topk_types)
def topk(
    x: Tensor,
    k: Tensor | int = 1,
    axis: Tensor | int = -1,
    ascending: Tensor | bool = False,
    sort: Tensor | bool = True,  # noqa: ARG001 unsorted only means that no order is promised
    return_indices: Tensor | bool = True,
    output_indices_dtype: str = "int32",  # noqa: ARG001 the executor applies it
) -> tuple[Tensor, ...]:
    """The k largest (or smallest) along `axis`, and where they are; −1 takes all."""
    values, indices = torch.sort(x, dim=int(axis), descending=not ascending, stable=True)
    count = x.shape[int(axis)] if int(k) == -1 else int(k)
    results = values.narrow(int(axis), 0, count), indices.narrow(int(axis), 0, count)
    return results if return_indices else results[:1]


@rule("cumsum")
def cumsum(
    x: Tensor, axis: Tensor | int = 0, exclusive: Tensor | bool = False, reverse: Tensor | bool = False
) -> Tensor:
    """Running sum along `axis`; exclusive leaves out the value itself."""
    along = int(axis)
    x = x.flip(along) if reverse else x
    total = x.cumsum(along)
    total = total - x if exclusive else total
    return total.flip(along) if reverse else total


@rule("band_part")
def band_part(x: Tensor, lower: Tensor | int = -1, upper: Tensor | int = -1) -> Tensor:
    """Zero outside a band of the innermost matrices; a negative width keeps the whole side."""
    below = torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-1])
    keep = torch.ones_like(below, dtype=torch.bool)
    keep = keep & (below <= int(lower)) if int(lower) >= 0 else keep
    keep = keep & (-below <= int(upper)) if int(upper) >= 0 else keep
    return torch.where(keep, x, torch.zeros((), dtype=x.dtype))


@rule("non_zero", result=always("int32"))
def non_zero(x: Tensor) -> Tensor:
    """Coordinates of the values that are not zero, one row each."""
    return x.nonzero()
