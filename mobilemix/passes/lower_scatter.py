"""Assignments to a part of a tensor as concatenations."""

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments
from mobilemix.passes.editing import Edit

aten = torch.ops.aten


class LowerScatter(Pass):
    """Put a part in its place by concatenation: what is before it, the part, what is behind.

        before:  x (B, N, C), part (B, n, C) → slice_scatter (dim 1, start, start + n) → y (B, N, C)
        after:   cat (x[:, :start], part, x[:, start + n:]) → y

    `y[:, a:b] = part` is captured as such an operator, for which runtimes have none but a slow general scatter.
    Assignments with a step stay.
    """

    name = "lower_scatter"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without assignments to slices."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            with edit.at(node):
                whole = _lower(edit, node)
            if whole is not None:
                edit.replace(node, whole)
        return edit.finish()


def _lower(edit: Edit, node: fx.Node) -> fx.Node | None:
    if node.target is aten.copy.default:
        target, part = node.meta["val"], arguments(node)["src"]
        if part.meta["val"].dtype != target.dtype:
            part = edit.emit(aten.to.dtype, part, target.dtype)
        same = part.meta["val"].shape == target.shape
        return part if same else edit.emit(aten.expand.default, part, list(target.shape))
    if node.target is aten.slice_scatter.default:
        values = arguments(node)
        start, stop, step = slice(values["start"], values["end"], values["step"]).indices(_size(node, values["dim"]))
        if start >= stop:
            return values["self"]  # type: ignore[no-any-return]
        return _replace(edit, values, values["src"], start, stop) if step == 1 else None
    if node.target is aten.select_scatter.default:
        values = arguments(node)
        index = values["index"] % _size(node, values["dim"])
        part = edit.emit(aten.unsqueeze.default, values["src"], values["dim"])
        return _replace(edit, values, part, index, index + 1)
    return None


def _replace(edit: Edit, values: dict[str, object], part: fx.Node, start: int, stop: int) -> fx.Node:
    """The tensor with `part` from `start` to `stop`."""
    whole, axis = values["self"], values["dim"]
    assert isinstance(whole, fx.Node)
    pieces = [part]
    if start > 0:
        pieces.insert(0, edit.emit(aten.slice.Tensor, whole, axis, 0, start))
    if stop < _size(whole, axis):
        pieces.append(edit.emit(aten.slice.Tensor, whole, axis, stop, _size(whole, axis)))
    return part if len(pieces) == 1 else edit.emit(aten.cat.default, pieces, axis)


def _size(node: fx.Node, axis: object) -> int:
    return int(node.meta["val"].shape[axis])
