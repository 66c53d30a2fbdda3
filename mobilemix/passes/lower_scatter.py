"""Assignments to parts of a tensor as one concatenation."""

import dataclasses

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments
from mobilemix.passes.editing import Edit

aten = torch.ops.aten

_SCATTERS = (aten.slice_scatter.default, aten.select_scatter.default)


class LowerScatter(Pass):
    """Put parts in their place by concatenation.

        before:  x (B, N, C), part (B, n, C) → slice_scatter (dim 1, start, start + n) → y (B, N, C)
        after:   cat (x[:, :start], part, x[:, start + n:]) → y

        before:  empty (B, 2, C) → select_scatter p (B, C) at 0 → select_scatter q (B, C) at 1 → y (B, 2, C)
        after:   cat (p (B, 1, C), q (B, 1, C)) → y

    `y[:, a:b] = part` is captured as such an operator, for which runtimes have none but a slow general scatter. A chain
    of assignments along one axis becomes one concatenation, and so does a slice of it that consists of whole parts.
    Assignments with a step stay.
    """

    name = "lower_scatter"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without assignments to slices."""
        edit = Edit(program)
        found: dict[fx.Node, _Parts] = {}
        for node in list(edit.graph.nodes):
            with edit.at(node):
                if node.target is aten.copy.default:
                    edit.replace(node, _copied(edit, node))
                    edit.erase(node)
                elif (parts := _find(edit, node, found)) is not None:
                    found[node] = parts
        made: dict[fx.Node, fx.Node] = {}
        for node, parts in found.items():
            # What only goes on in longer chains is not needed itself, nor is what assignments took a view of.
            users = (user for user in node.users if user.users or user.op == "output")
            if any(user not in found or found[user].base is not node for user in users):
                with edit.at(node):
                    made[node] = parts.emit(edit, made)
                edit.replace(node, made[node])
        return edit.finish()


@dataclasses.dataclass(frozen=True)
class _Part:
    """From `start` to `stop` of a tensor along an axis."""

    node: fx.Node
    start: int
    stop: int


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What a tensor is the concatenation of.

    Attributes:
        axis: along which.
        parts: in order.
        base: the tensor whose own parts these were; None if it had none along this axis.
    """

    axis: int
    parts: tuple[_Part, ...]
    base: fx.Node | None

    def cut(self, start: int, stop: int) -> tuple[_Part, ...]:
        """The parts from `start` to `stop` of the whole."""
        kept, position = [], 0
        for part in self.parts:
            low, high = max(start - position, 0), min(stop - position, part.stop - part.start)
            if low < high:
                kept.append(_Part(part.node, part.start + low, part.start + high))
            position += part.stop - part.start
        return tuple(kept)

    def emit(self, edit: Edit, made: dict[fx.Node, fx.Node]) -> fx.Node:
        """The concatenation; `made` has what replaced tensors since they were found to be parts."""
        pieces = []
        for part in self.parts:
            node = made.get(part.node, part.node)
            is_whole = (part.start, part.stop) == (0, _size(node, self.axis))
            pieces.append(node if is_whole else edit.emit(aten.slice.Tensor, node, self.axis, part.start, part.stop))
        return pieces[0] if len(pieces) == 1 else edit.emit(aten.cat.default, pieces, self.axis)


def _find(edit: Edit, node: fx.Node, found: dict[fx.Node, _Parts]) -> _Parts | None:
    """The parts of an assignment's result, or of a slice of one; None for any other node."""
    if node.target not in (*_SCATTERS, aten.slice.Tensor):
        return None
    values = arguments(node)
    whole = values["self"]
    axis = values["dim"] % whole.meta["val"].dim()
    known = found.get(whole)
    if known is None or known.axis != axis:
        known = _Parts(axis, (_Part(whole, 0, _size(whole, axis)),), None)
    size = _size(whole, axis)
    if node.target is aten.select_scatter.default:
        start = values["index"] % size
        stop, step = start + 1, 1
    else:
        start, stop, step = slice(values["start"], values["end"], values["step"]).indices(size)
    if step != 1:
        return None
    base = whole if found.get(whole) is known else None
    if node.target is aten.slice.Tensor:
        parts = known.cut(start, stop)
        is_simple = base is not None and parts and all(part in known.parts for part in parts)
        return _Parts(axis, parts, base) if is_simple else None
    if start >= stop:
        return dataclasses.replace(known, base=base)
    part = values["src"]
    if node.target is aten.select_scatter.default:
        part = edit.emit(aten.unsqueeze.default, part, axis)
    middle = (_Part(part, 0, stop - start),)
    return _Parts(axis, known.cut(0, start) + middle + known.cut(stop, size), base)


def _copied(edit: Edit, node: fx.Node) -> fx.Node:
    """What is assigned to a whole tensor, in its dtype and shape."""
    target, part = node.meta["val"], arguments(node)["src"]
    if part.meta["val"].dtype != target.dtype:
        part = edit.emit(aten.to.dtype, part, target.dtype)
    same = part.meta["val"].shape == target.shape
    return part if same else edit.emit(aten.expand.default, part, list(target.shape))


def _size(node: fx.Node, axis: int) -> int:
    return int(node.meta["val"].shape[axis])
