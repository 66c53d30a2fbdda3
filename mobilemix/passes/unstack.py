"""Tensors that are stacked only to be taken apart again."""

import operator

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments
from mobilemix.passes.editing import Edit
from mobilemix.passes.elementwise import BINARY, UNARY, is_elementwise

aten = torch.ops.aten


class Unstack(Pass):
    """Take what was stacked instead of selecting it from the stack, elementwise operators in between included.

        before:  re, im (B, H, W, G, C) → stack (-1) (B, H, W, G, C, 2) → softshrink → select (-1, 0) → y
        after:   re (B, H, W, G, C) → softshrink → y (B, H, W, G, C)

    Code for complex numbers does this to work on both parts at once. The stack may have more axes than Core ML takes.
    """

    name = "unstack"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with selections from stacks replaced."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            if node.target is aten.select.int:
                values = arguments(node)
                with edit.at(node):
                    part = _part(edit, values["self"], values["dim"], values["index"])
                if part is not None:
                    edit.replace(node, part)
            elif node.target is operator.getitem and node.args[0].target is aten.unbind.int:
                values = arguments(node.args[0])
                with edit.at(node):
                    part = _part(edit, values["self"], values["dim"], node.args[1])
                if part is not None:
                    edit.replace(node, part)
        return edit.finish()


def _part(edit: Edit, node: fx.Node, axis: int, index: int) -> fx.Node | None:
    """Entry `index` along `axis` of a stack, or of an elementwise function of one."""
    rank = node.meta["val"].dim()
    if node.target is aten.stack.default:
        values = arguments(node)
        return values["tensors"][index] if values["dim"] % rank == axis % rank else None
    others = node.args[1:]
    if not is_elementwise(node, UNARY | BINARY) or any(isinstance(item, fx.Node) for item in others):
        return None
    x = node.args[0]
    part = _part(edit, x, axis, index) if isinstance(x, fx.Node) else None
    return None if part is None else edit.emit(node.target, part, *others, **node.kwargs)
