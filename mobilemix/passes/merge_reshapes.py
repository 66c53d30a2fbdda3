"""Chains of reshapes as one, and elementwise operators before a reshape rather than after it."""

from collections.abc import Sequence

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.axes import RESHAPES, axis_before, groups_of_axes
from mobilemix.passes.base import Pass, PassResult, arguments, node_shape, operand
from mobilemix.passes.editing import Edit
from mobilemix.passes.elementwise import BINARY, UNARY, is_elementwise

aten = torch.ops.aten


class MergeReshapes(Pass):
    """Let reshapes meet, and make one of those that do.

        before:  x (B, C, H, W) → reshape (B, G, C/G, H, W) → add bias (G, C/G, 1, 1) → silu → flatten (1, 2) → conv2d
        after:   x → add bias (C, 1, 1) → silu → conv2d

    An elementwise operator moves before the reshape of its operand. Another operand has to be reshaped alike, or to be
    a constant, and may be broadcast along axes that the reshape neither splits nor merges with others. So does a mean
    over such axes, and a convolution of kernel 1 over the positions of an image, which then is one of two dimensions:

        before:  x (B, C, H, W) → flatten (2) → sub mean (1) → conv1d (D, C, 1) → reshape (B, D, H, W) → conv2d
        after:   x → sub mean (1) → conv2d (D, C, 1, 1) → conv2d
    """

    name = "merge_reshapes"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with as few reshapes as are needed."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            with edit.at(node):
                simpler = _merge(edit, node) if node.target in RESHAPES else _move_up(edit, node)
            if simpler is not None:
                edit.replace(node, simpler)
        return edit.finish()


def _merge(edit: Edit, node: fx.Node) -> fx.Node | None:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    root = x.args[0] if x.target in RESHAPES else x
    assert isinstance(root, fx.Node)
    if node_shape(root) == node_shape(node) and root.op != "placeholder":
        return root
    if root is x and node.target is aten.reshape.default:
        return None
    return edit.emit(aten.reshape.default, root, list(node_shape(node)))


def _move_up(edit: Edit, node: fx.Node) -> fx.Node | None:
    if node.target is aten.mean.dim:
        return _move_mean(edit, node)
    if node.target is aten.conv1d.default:
        return _move_pointwise(edit, node)
    if not is_elementwise(node, UNARY | BINARY):
        return None
    reshaped = [item for item in node.args if isinstance(item, fx.Node) and item.target in RESHAPES]
    whole = next((item for item in reshaped if node_shape(item) == node_shape(node)), None)
    if whole is None:
        return None
    before, after = node_shape(operand(whole)), node_shape(whole)
    operands: list[object] = list(node.args)
    for position, item in enumerate(node.args):
        if not isinstance(item, fx.Node):
            continue
        shape = _regroup(node_shape(item), after, before)
        if item in reshaped and shape is not None and node_shape(operand(item)) == tuple(shape):
            operands[position] = operand(item)
        elif shape is not None and edit.is_static(item):
            operands[position] = item if not shape else edit.emit(aten.reshape.default, item, shape)
        else:
            return None
    return edit.emit(aten.reshape.default, edit.emit(node.target, *operands, **node.kwargs), list(after))


def _move_mean(edit: Edit, node: fx.Node) -> fx.Node | None:
    """A mean over axes that the reshape before it leaves alone."""
    values = arguments(node)
    x = values["self"]
    if x.target not in RESHAPES or not values["keepdim"] or not values["dim"]:
        return None
    axes = [axis_before(x, axis % len(node_shape(x))) for axis in values["dim"]]
    if None in axes:
        return None
    mean = edit.emit_like(node, self=operand(x), dim=axes)
    return edit.emit(aten.reshape.default, mean, list(node_shape(node)))


def _move_pointwise(edit: Edit, node: fx.Node) -> fx.Node | None:
    """A convolution of kernel 1 over the positions of a map, laid out in one row."""
    values = arguments(node)
    x, weight = values["input"], edit.constant(values["weight"])
    if x.target not in RESHAPES or weight is None or weight.shape[2] != 1:
        return None
    if values["stride"] != [1] or values["padding"] != [0]:
        return None
    image = operand(x)
    if len(node_shape(image)) != 4 or node_shape(image)[:2] != node_shape(x)[:2]:
        return None
    square = edit.add_constant(edit.name(values["weight"]), weight.unsqueeze(-1))
    mapped = edit.emit(aten.conv2d.default, image, square, values["bias"], [1, 1], [0, 0], [1, 1], values["groups"])
    return edit.emit(aten.reshape.default, mapped, list(node_shape(node)))


def _regroup(constant: Sequence[int], after: Sequence[int], before: Sequence[int]) -> list[int] | None:
    """The shape under which a constant that broadcasts to `after` does the same for `before`; None if there is none."""
    padded = [1] * (len(after) - len(constant)) + list(constant)
    found: list[int] = []
    for old, new in groups_of_axes(before, after):
        sizes = [padded[axis] for axis in new]
        if all(size == 1 for size in sizes):
            found += [1] * len(old)
        elif sizes == [after[axis] for axis in new]:
            found += [before[axis] for axis in old]
        else:
            return None
    return found
