"""Two classifier heads whose average is the output."""

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments
from mobilemix.passes.editing import Edit

aten = torch.ops.aten


class AverageHeads(Pass):
    """Linear maps of the same input that are only added, and scaled, become one.

        before:  x (N, C) → linear W_a (K, C) → a (N, K);   x → linear W_b (K, C) → b (N, K);   (a + b) / 2 → y (N, K)
        after:   x (N, C) → linear (W_a + W_b) / 2 (K, C) → y (N, K)

    Models trained by distillation end in such a pair: a head for the labels and one for the teacher. Biases likewise.
    """

    name = "average_heads"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with such heads merged."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            with edit.at(node):
                merged = _merge(edit, node)
            if merged is not None:
                edit.replace(node, merged)
        return edit.finish()


def _merge(edit: Edit, node: fx.Node) -> fx.Node | None:
    if node.target not in (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor) or len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    heads = [_parameters(edit, item) for item in (a, b)]
    if heads[0] is None or not isinstance(a, fx.Node):
        return None
    (weight, bias), x = heads[0], a.args[0]
    if node.target is aten.add.Tensor:
        if heads[1] is None or a is b or b.args[0] is not x:  # type: ignore[union-attr]
            return None
        weight, bias = weight + heads[1][0], bias + heads[1][1]
    elif isinstance(b, int | float):
        factor = b if node.target is aten.mul.Tensor else 1 / b
        weight, bias = weight * factor, bias * factor
    else:
        return None
    name, dtype = edit.name(arguments(a)["weight"]), a.meta["val"].dtype
    return edit.emit_like(
        a,
        weight=edit.add_constant(name, weight.to(dtype)),
        bias=edit.add_constant(name.removesuffix("weight") + "bias", bias.to(dtype)),
    )


def _parameters(edit: Edit, node: object) -> tuple[Tensor, Tensor] | None:
    """Weight and bias, in float64, of a linear map with one user."""
    if not isinstance(node, fx.Node) or node.target is not aten.linear.default or len(node.users) != 1:
        return None
    values = arguments(node)
    weight, bias = edit.constant(values["weight"]), edit.constant(values["bias"])
    if weight is None or (values["bias"] is not None and bias is None):
        return None
    return weight.double(), weight.new_zeros(len(weight)).double() if bias is None else bias.double()
