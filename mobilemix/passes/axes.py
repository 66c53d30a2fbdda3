"""Where the axes of a value go as it is reshaped or transposed."""

import math
from collections.abc import Sequence

import torch
from torch import fx

from mobilemix.passes.base import arguments, node_shape, operand

aten = torch.ops.aten

RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
)
SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


def axis_after(node: fx.Node, axis: int) -> int | None:
    """Where a node puts an axis of its first operand; None if it does not only move values, or splits the axis."""
    x = operand(node)
    if node.target in RESHAPES:
        return _regrouped(node_shape(x), node_shape(node), axis)
    order = permutation(node)
    return order.index(axis) if order else None


def axis_before(node: fx.Node, axis: int) -> int | None:
    """Where an axis of a node comes from in its first operand; None as for `axis_after`."""
    x = operand(node)
    if node.target in RESHAPES:
        return _regrouped(node_shape(node), node_shape(x), axis)
    order = permutation(node)
    return order[axis] if order else None


def only_moves(node: fx.Node) -> bool:
    """Whether a node puts the values of its first operand into another shape or order."""
    return node.target in RESHAPES or bool(permutation(node))


def permutation(node: fx.Node) -> list[int]:
    """The axes of the operand that the axes of a transposition come from; none for any other node."""
    if node.target is aten.permute.default:
        return [axis % len(node_shape(node)) for axis in arguments(node)["dims"]]
    if node.target is not aten.transpose.int:
        return []
    order = list(range(len(node_shape(node))))
    a, b = (arguments(node)[name] for name in ("dim0", "dim1"))
    order[a], order[b] = order[b], order[a]
    return order


def _regrouped(before: tuple[int, ...], after: tuple[int, ...], axis: int) -> int | None:
    if before[axis] == 1:
        return None
    for old, new in groups_of_axes(before, after):
        if axis in old:
            old, new = [a for a in old if before[a] != 1], [a for a in new if after[a] != 1]
            return new[0] if len(old) == len(new) == 1 else None
    return None


def groups_of_axes(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes of two shapes of the same numbers in the finest groups of equal size."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) or j < len(b):
        left, right = [i] if i < len(a) else [], [j] if j < len(b) else []
        i, j = i + len(left), j + len(right)
        while (size := math.prod(a[k] for k in left)) != (other := math.prod(b[k] for k in right)):
            if size < other:
                left.append(i)
                i += 1
            else:
                right.append(j)
                j += 1
        groups.append((left, right))
    return groups
