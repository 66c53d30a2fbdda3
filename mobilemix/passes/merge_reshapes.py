"""Chains of reshapes as one, and elementwise operators before a reshape rather than after it."""

import math
from collections.abc import Sequence

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, node_shape
from mobilemix.passes.editing import Edit
from mobilemix.passes.elementwise import BINARY, UNARY, is_elementwise

aten = torch.ops.aten

_RESHAPES = (
    aten.reshape.default,
    aten.view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.unsqueeze.default,
)


class MergeReshapes(Pass):
    """Let reshapes meet, and make one of those that do.

        before:  x (B, C, H, W) → reshape (B, G, C/G, H, W) → add bias (G, C/G, 1, 1) → silu → flatten (1, 2) → conv2d
        after:   x → add bias (C, 1, 1) → silu → conv2d

    An elementwise operator moves before the reshape of its operand. Of two operands, both have to be reshaped from and
    to the same shapes, or one has to be a constant that is broadcast along axes that the reshape neither splits nor
    merges with others.
    """

    name = "merge_reshapes"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with as few reshapes as are needed."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            with edit.at(node):
                simpler = _merge(edit, node) if node.target in _RESHAPES else _move_up(edit, node)
            if simpler is not None:
                edit.replace(node, simpler)
        return edit.finish()


def _merge(edit: Edit, node: fx.Node) -> fx.Node | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    root = x.args[0] if x.target in _RESHAPES else x
    assert isinstance(root, fx.Node)
    if node_shape(root) == node_shape(node) and root.op != "placeholder":
        return root
    if root is x and node.target is aten.reshape.default:
        return None
    return edit.emit(aten.reshape.default, root, list(node_shape(node)))


def _move_up(edit: Edit, node: fx.Node) -> fx.Node | None:
    if not is_elementwise(node, UNARY | BINARY):
        return None
    tensors = [item for item in node.args if isinstance(item, fx.Node)]
    reshaped = [item for item in tensors if item.target in _RESHAPES]
    shapes = {(node_shape(item.args[0]), node_shape(item)) for item in reshaped}  # type: ignore[arg-type]
    if len(shapes) != 1:
        return None
    ((before, after),) = shapes
    if after != node_shape(node):
        return None
    arguments: list[object] = list(node.args)
    for position, item in enumerate(node.args):
        if not isinstance(item, fx.Node):
            continue
        if item in reshaped:
            arguments[position] = item.args[0]
            continue
        shape = _regroup(node_shape(item), after, before) if edit.is_static(item) else None
        if shape is None:
            return None
        arguments[position] = item if not shape else edit.emit(aten.reshape.default, item, shape)
    return edit.emit(aten.reshape.default, edit.emit(node.target, *arguments, **node.kwargs), list(after))


def _regroup(constant: Sequence[int], after: Sequence[int], before: Sequence[int]) -> list[int] | None:
    """The shape under which a constant that broadcasts to `after` does the same for `before`; None if there is none."""
    padded = [1] * (len(after) - len(constant)) + list(constant)
    found: list[int] = []
    for old, new in _groups(before, after):
        sizes = [padded[axis] for axis in new]
        if all(size == 1 for size in sizes):
            found += [1] * len(old)
        elif sizes == [after[axis] for axis in new]:
            found += [before[axis] for axis in old]
        else:
            return None
    return found


def _groups(a: Sequence[int], b: Sequence[int]) -> list[tuple[list[int], list[int]]]:
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
