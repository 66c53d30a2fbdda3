"""Operators that take a part of a tensor along one axis, in one form."""

import dataclasses
import operator
from typing import Any

import torch
from torch import fx

from mobilemix.passes.base import arguments

aten = torch.ops.aten

_SPLITS = (aten.unbind.int, aten.split.Tensor, aten.split.sizes, aten.split_with_sizes.default, aten.chunk.default)


@dataclasses.dataclass(frozen=True)
class Cut:
    """`size` entries of `source` along `axis` from `start` on; None is one entry without its axis."""

    source: fx.Node
    axis: int
    start: int
    size: int | None


def cut(node: fx.Node) -> Cut | None:
    """What part of what tensor a node is; None if it is something else."""
    if node.target is aten.select.int:
        values = arguments(node)
        sizes = values["self"].meta["val"].shape
        axis = values["dim"] % len(sizes)
        return Cut(values["self"], axis, values["index"] % sizes[axis], None)
    if node.target is aten.slice.Tensor:
        values = arguments(node)
        sizes = values["self"].meta["val"].shape
        axis = values["dim"] % len(sizes)
        start, stop, step = slice(values["start"], values["end"], values["step"]).indices(sizes[axis])
        return Cut(values["self"], axis, start, stop - start) if step == 1 and stop > start else None
    if node.target is aten.narrow.default:
        values = arguments(node)
        sizes = values["self"].meta["val"].shape
        axis = values["dim"] % len(sizes)
        return Cut(values["self"], axis, values["start"] % sizes[axis], values["length"])
    if node.target is operator.getitem:
        parts: Any = node.args[0]
        index: Any = node.args[1]
        if parts.target not in _SPLITS:
            return None
        values = arguments(parts)
        source, axis = values["self"], values["dim"] % values["self"].meta["val"].dim()
        if parts.target is aten.unbind.int:
            return Cut(source, axis, index % len(parts.meta["val"]), None)
        extents = [part.shape[axis] for part in parts.meta["val"]]
        index = index % len(extents)
        return Cut(source, axis, sum(extents[:index]), extents[index])
    return None
