"""Operators that write into a tensor as operators that return a new one."""

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult
from mobilemix.passes.editing import Edit

aten = torch.ops.aten


class MakeFunctional(Pass):
    """Return a new tensor instead of writing into one, or into a slice of it.

        before:  x (B, C) → zeros_like → z;   z → slice (1, 0, n) → copy_ (part (B, n));   z → add_ (1) → y (B, C)
        after:   x → zeros_like → z → slice_scatter (part, 1, 0, n) → add (1) → y

    `capture` runs it, too; other passes see each value once and for all. Where what is written may be read through
    another view, `run_decompositions({})` does the same, but takes batch norm and others apart.
    """

    name = "make_functional"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without operators that write into a tensor."""
        if not any(_writes(node) for node in program.graph.nodes):
            return PassResult(program, False)
        edit = Edit(program)
        edit.changed = _functionalise(edit.graph)
        return edit.finish() if edit.changed else PassResult(program.run_decompositions({}), True)


def _functionalise(graph: fx.Graph) -> bool:
    """Replace operators that write into a tensor, or a slice of it, by ones that return a new one.

    False if one is left, which may have another view that reads it.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        functional = _functional(node.target)
        base, views = node.args[0], []
        while isinstance(base, fx.Node) and base.target in _SCATTERS:
            views.append(base)
            base = base.args[0]
        if functional is None or not isinstance(base, fx.Node) or base.op != "call_function" or _aliases(base):
            return False
        seen_again = [
            view for view in _views(base) if order[view] < order[node] and _last_use(view, order) > order[node]
        ]
        if seen_again or (views and any(_writes(user) for user in node.users)):
            return False
        node.target = functional
        whole = node
        for view in views:
            with graph.inserting_after(whole):
                whole = graph.call_function(_SCATTERS[view.target], (view.args[0], whole, *view.args[1:]), view.kwargs)
            whole.meta = {**node.meta, "val": view.args[0].meta["val"]}  # type: ignore[union-attr]
            order[whole] = order[node]
        for user in list(base.users):
            if order[user] > order[node]:
                user.replace_input_with(base, whole)
    return True


_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def _functional(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """aten.add for aten.add_, and so on; None where there is none."""
    name = op._opname
    packet = getattr(aten, name[:-1], None) if op.namespace == "aten" and name.endswith("_") else None
    return getattr(packet, op._overloadname, None)


def _views(node: fx.Node) -> list[fx.Node]:
    """What may share memory with `node`, directly or through others, besides itself."""
    direct = [user for user in node.users if user.op == "call_function" and _aliases(user)]
    return direct + [view for user in direct for view in _views(user)]


def _last_use(node: fx.Node, order: dict[fx.Node, int]) -> int:
    return max((order[user] for user in node.users), default=-1)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _aliases(node: fx.Node) -> bool:
    """Whether the node's value may share memory with its input."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op != "output"
    return any(value.alias_info is not None for value in node.target._schema.returns)
