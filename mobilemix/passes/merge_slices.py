"""Slices of a tensor that are treated alike, and put together again."""

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments, node_shape
from mobilemix.passes.editing import Edit
from mobilemix.passes.elementwise import UNARY, is_elementwise

aten = torch.ops.aten


class MergeSlices(Pass):
    """Apply an elementwise operator to a tensor rather than to each of its slices; drop slices that are concatenated.

    before:  x (B, 2C, H, W) → slices a, b (B, C, H, W);   a → silu → p;   b → silu → q;   cat (p, q) → y (B, 2C, H, W)
    after:   x → silu → y
    """

    name = "merge_slices"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without such slices."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            if is_elementwise(node, UNARY):
                _merge_elementwise(edit, node)
            elif node.target is aten.cat.default:
                whole = _whole(arguments(node)["tensors"])
                if whole is not None and node_shape(whole) == node_shape(node):
                    edit.replace(node, whole)
        return edit.finish()


def _merge_elementwise(edit: Edit, node: fx.Node) -> None:
    x = node.args[0]
    if not isinstance(x, fx.Node) or x.target is not aten.slice.Tensor:
        return
    source = x.args[0]
    assert isinstance(source, fx.Node)
    parts = list(source.users)
    calls = [next(iter(part.users)) for part in parts]
    same = all(
        len(part.users) == 1 and (call.target, call.args[1:], call.kwargs) == (node.target, node.args[1:], node.kwargs)
        for part, call in zip(parts, calls, strict=True)
    )
    if not same or _whole(parts) is not source:
        return
    with edit.at(node):
        whole = edit.emit(node.target, source, *node.args[1:], **node.kwargs)
        for part, call in zip(parts, calls, strict=True):
            edit.replace(call, edit.emit_like(part, self=whole))


def _whole(parts: list[fx.Node]) -> fx.Node | None:
    """The tensor that the parts, slices of it in this order along one axis, make up; None if they do not."""
    if any(part.target is not aten.slice.Tensor for part in parts):
        return None
    cuts = [arguments(part) for part in parts]
    source, axis = cuts[0]["self"], cuts[0]["dim"]
    if any(cut["self"] is not source or cut["dim"] != axis or cut["step"] != 1 for cut in cuts):
        return None
    size = node_shape(source)[axis]
    stops = [0, *(min(cut["end"], size) for cut in cuts)]
    return source if stops[-1] == size and [cut["start"] for cut in cuts] == stops[:-1] else None
