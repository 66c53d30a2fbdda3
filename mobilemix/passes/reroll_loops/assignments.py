"""Assignments to a part of a tensor, and what is read from one afterwards."""

import dataclasses

import torch
from torch import fx

from mobilemix.passes.base import arguments, node_shape
from mobilemix.passes.editing import Edit
from mobilemix.passes.reroll_loops.cuts import cut

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Assignment:
    """`part` in place of what `whole` has along `axis` from `start` to `stop`; which a selected part lacks."""

    whole: fx.Node
    part: fx.Node
    axis: int
    start: int
    stop: int


def assignment(node: fx.Node) -> Assignment | None:
    """What a node assigns; None if it is something else, or assigns with a step or another dtype."""
    if node.target not in (aten.select_scatter.default, aten.slice_scatter.default):
        return None
    values = arguments(node)
    whole, part = values["self"], values["src"]
    axis = values["dim"] % len(node_shape(node))
    size = node_shape(node)[axis]
    if node.target is aten.select_scatter.default:
        start, stop, step = values["index"] % size, values["index"] % size + 1, 1
    else:
        start, stop, step = slice(values["start"], values["end"], values["step"]).indices(size)
    if step != 1 or stop <= start or part.meta["val"].dtype != node.meta["val"].dtype:
        return None
    return Assignment(whole, part, axis, start, stop)


def forward(edit: Edit) -> None:
    """Let what was assigned be read from there, not from the tensor; this does not count as a change."""
    for node in edit.graph.find_nodes(op="call_function", target=aten.copy.default):
        value: fx.Node = arguments(node)["src"]
        if node_shape(value) == node_shape(node) and value.meta["val"].dtype == node.meta["val"].dtype:
            node.replace_all_uses_with(value)
            edit.graph.erase_node(node)
    known: dict[fx.Node, Assignment | None] = {}
    for node in list(edit.graph.nodes):
        known[node] = assignment(node)
        read = _assigned(edit, known, node) if node.users else None
        if read is not None:
            node.replace_all_uses_with(read)


def _assigned(edit: Edit, known: dict[fx.Node, Assignment | None], node: fx.Node) -> fx.Node | None:
    part = cut(node)
    if part is None:
        return None
    here, stop = part.source, part.start + (part.size or 1)
    while (found := known.get(here)) is not None and found.axis == part.axis:
        if found.start < stop and part.start < found.stop:
            same = (found.start, found.stop, node_shape(found.part)) == (part.start, stop, node_shape(node))
            return found.part if same else None
        here = found.whole
    if here is part.source:
        return None
    with edit.at(node):
        if part.size is None:
            return edit.emit(aten.select.int, here, part.axis, part.start)
        return edit.emit(aten.slice.Tensor, here, part.axis, part.start, stop)
