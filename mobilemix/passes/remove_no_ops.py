"""Operators that do nothing at inference."""

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments
from mobilemix.passes.editing import Edit

aten = torch.ops.aten

_COPIES = {"alias", "clone", "contiguous", "detach", "dropout", "feature_dropout", "alpha_dropout", "lift_fresh_copy"}
_UNCHANGED_IF_SAME_SHAPE = {"expand", "expand_as", "flatten", "reshape", "squeeze", "unflatten", "view"}
_UNCHANGED_IF_SAME_DTYPE = {"to", "type_as"}
_NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}  # of the second operand, as a number
_CHECKS = {"_assert_tensor_metadata"}


class RemoveNoOps(Pass):
    """Drop copies, dropout in evaluation mode, casts and reshapes to what is there already, x + 0, x · 1, and checks.

        before:  x (N, C) → dropout (p, train=False) → contiguous → view (N, C) → y
        after:   y = x

    `view` becomes `reshape`, since without the copies a tensor may no longer be contiguous.
    """

    name = "remove_no_ops"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without its no-ops."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
                continue
            if node.target._opname in _CHECKS:
                edit.erase(node)
            elif _is_no_op(node):
                edit.replace(node, node.all_input_nodes[0])
                edit.erase(node)  # torch takes dropout for a side effect, which it would keep
            elif node.target in (aten.view.default, aten._unsafe_view.default):
                with edit.at(node):
                    edit.replace(node, edit.emit(aten.reshape.default, *node.args))
        edit.changed |= edit.graph.eliminate_dead_code()
        return edit.finish()


def _is_no_op(node: fx.Node) -> bool:
    name = node.target._opname  # type: ignore[union-attr]
    if name in _NEUTRAL:
        if not isinstance(node.args[0], fx.Node) or node.args[1] != _NEUTRAL[name] or node.kwargs:
            return False
    elif name not in _COPIES | _UNCHANGED_IF_SAME_SHAPE | _UNCHANGED_IF_SAME_DTYPE:
        return False
    if arguments(node).get("train") is True:
        return False
    x = node.all_input_nodes[0]
    if x.op == "placeholder" and any(user.op == "output" for user in node.users):
        return False  # an output that is an input is a special case for every consumer
    before, after = x.meta["val"], node.meta["val"]
    return bool(before.shape == after.shape and before.dtype == after.dtype)
