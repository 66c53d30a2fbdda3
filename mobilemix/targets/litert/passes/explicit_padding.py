"""Convolutions whose padding is a word, with the numbers that it stands for."""

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments, node_shape
from mobilemix.passes.editing import Edit

aten = torch.ops.aten

_NUMBERED: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


class ExplicitPadding(Pass):
    """A convolution with padding "same" or "valid" becomes one with numbers.

        before:  x (B, C, L) → conv1d (k = 4, padding "same")
        after:   x → constant_pad_nd (1, 2) → conv1d (k = 4, padding 0)

    and without an operator of its own where both sides get the same. litert-torch's decomposition of `conv1d` takes the
    letters of the word for numbers.
    """

    name = "explicit_padding"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without words."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            if node.op == "call_function" and node.target in _NUMBERED:
                with edit.at(node):
                    edit.replace(node, _numbered(edit, node))
        return edit.finish()


def _numbered(edit: Edit, node: fx.Node) -> fx.Node:
    values = arguments(node)
    x, kernel = values["input"], node_shape(values["weight"])[2:]
    dilation = list(values["dilation"]) * (len(kernel) // len(values["dilation"]))
    is_same = values["padding"] == "same"
    totals = [step * (size - 1) if is_same else 0 for step, size in zip(dilation, kernel, strict=True)]
    padding = [total // 2 for total in totals]
    if any(total % 2 for total in totals):
        # The odd one comes at the end; the last axis is named first.
        sides = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
        x, padding = edit.emit(aten.constant_pad_nd.default, x, sides), [0] * len(totals)
    rest = (values["weight"], values["bias"], values["stride"], padding, values["dilation"], values["groups"])
    return edit.emit(_NUMBERED[node.target], x, *rest)
