"""Soft shrinkage in operators that every target has."""

import torch
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments
from mobilemix.passes.editing import Edit

aten = torch.ops.aten


class LowerSoftshrink(Pass):
    """Soft shrinkage with threshold λ is what a clip to [−λ, λ] leaves over.

        before:  x (…) → softshrink (λ) → y (…)
        after:   x → clamp (−λ, λ) → x − · → y

    Core ML, LiteRT and OpenVINO have no such operator; its own decomposition takes five nodes.
    """

    name = "lower_softshrink"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without softshrink."""
        edit = Edit(program)
        for node in edit.graph.find_nodes(op="call_function", target=aten.softshrink.default):
            values = arguments(node)
            with edit.at(node):
                clipped = edit.emit(aten.clamp.default, values["self"], -values["lambd"], values["lambd"])
                edit.replace(node, edit.emit(aten.sub.Tensor, values["self"], clipped))
        return edit.finish()
