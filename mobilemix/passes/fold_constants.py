"""What depends on weights alone, computed now."""

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mobilemix.passes.base import Pass, PassResult
from mobilemix.passes.editing import Edit

_MAY_GROW_TO = 65536
"""Elements that a constant may always have; a larger one has to be smaller than what it is computed from."""

_TRANSFORMS = ("aten.fft_", "aten._fft_")


class FoldConstants(Pass):
    """Replace operators on parameters and buffers by their result.

        before:  w (2, G, I, O) → select (0, 0) → (G, I, O);    arange (H) → … → grid (1, H, W)
        after:   w_select (G, I, O), a buffer;                  grid (1, H, W), a buffer

    A chain of operators is computed in float64 and rounded once. An operator that makes a large constant out of smaller
    ones (expand, repeat, zeros) stays, unless a Fourier transform of constants needs it.
    """

    name = "fold_constants"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with its constant expressions evaluated."""
        edit = Edit(program)
        transformed = _transformed(edit)
        known: dict[fx.Node, Any] = {}
        weights: dict[fx.Node, fx.Node] = {}  # the first parameter or buffer that a value is computed from
        for node in edit.graph.nodes:
            if node.op != "call_function" or not _is_pure(node.target):
                continue
            inputs = node.all_input_nodes
            if any(x not in known and edit.constant(x) is None for x in inputs):
                continue
            if node not in transformed and _size(node) > max(_MAY_GROW_TO, sum(map(_size, inputs))):
                continue
            args, kwargs = fx.map_arg(
                (node.args, node.kwargs), lambda x: known[x] if x in known else _widen(edit.constant(x))
            )
            known[node] = _widen(node.target(*args, **kwargs))
            weights[node] = next((weights.get(x, x) for x in inputs), node)
        for node, value in known.items():
            if isinstance(value, Tensor) and any(user not in known for user in node.users):
                name = edit.name(weights[node])
                verb = getattr(node.target, "_opname", "item")
                name = name if name.endswith(verb) else f"{name}_{verb}"
                edit.replace(node, edit.add_constant(name, value.to(node.meta["val"].dtype)))
        return edit.finish()


def _transformed(edit: Edit) -> set[fx.Node]:
    """Fourier transforms of constants, and what they are computed from.

    Folding them saves a product with a matrix, which is larger than their result.
    """
    static: set[fx.Node] = set()
    for node in edit.graph.find_nodes(op="placeholder"):
        if edit.constant(node) is not None:
            static.add(node)
    for node in edit.graph.nodes:
        if node.op == "call_function" and _is_pure(node.target) and static.issuperset(node.all_input_nodes):
            static.add(node)
    needed: set[fx.Node] = set()
    for node in reversed(edit.graph.nodes):
        if node in needed or (node in static and str(node.target).startswith(_TRANSFORMS)):
            needed |= {node, *node.all_input_nodes}
    return needed


def _is_pure(op: Any) -> bool:
    if op is operator.getitem:
        return True
    return (
        isinstance(op, torch._ops.OpOverload)
        and op.namespace == "aten"
        and bool(op._schema.returns)
        and not op._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in op.tags
    )


def _size(node: fx.Node) -> int:
    return sum(item.numel() for item in pytree.tree_leaves(node.meta["val"]) if isinstance(item, Tensor))


def _widen(value: Any) -> Any:
    def one(item: Tensor) -> Tensor:
        return item.to(torch.complex128) if item.is_complex() else item.double() if item.is_floating_point() else item

    return pytree.tree_map_only(Tensor, one, value)
