"""One operator on tensors that have, or have not, an axis of time in front."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten

_ALONG_LAST_AXES = (aten.linear.default, aten.layer_norm.default, aten.rms_norm.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default)


def batch(
    emit: Callable[..., fx.Node],
    empty: Callable[[Sequence[int], torch.dtype], Tensor],
    op: torch._ops.OpOverload,
    args: Any,
    kwargs: Any,
) -> fx.Node:
    """The operator at every step, time in front.

    Operators that treat a further axis in front as any other stay whole; the others become what `torch.vmap` makes of
    them. Some tensor among the arguments, each with its `node`, its `shape` at one step and whether it is `timed`, is.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_tensor)
    tensors = [leaf for leaf in leaves if _is_tensor(leaf)]

    def call(nodes: Sequence[Any], *changed: Any) -> fx.Node:
        given = iter(nodes)
        call_args, call_kwargs = pytree.tree_unflatten(
            [next(given) if _is_tensor(leaf) else leaf for leaf in leaves], spec
        )
        return emit(op, *changed, *call_args[len(changed) :], **call_kwargs)

    ranks = [len(item.shape) for item in tensors]
    if torch.Tag.pointwise in op.tags or op._opname == "to" or (op is aten.matmul.default and min(ranks) > 1):
        return call([_aligned(emit, item, max(ranks)) for item in tensors])
    only_first = tensors[0] is args[0] and not any(item.timed for item in tensors[1:])
    if only_first and (op in _ALONG_LAST_AXES or (op is aten.matmul.default and ranks[1] == 2)):
        return call([item.node for item in tensors])
    if op is aten.einsum.default and "->" in args[0]:
        return call([item.node for item in tensors], _timed_equation(args[0], [item.timed for item in tensors]))
    return _vmap(emit, empty, op, leaves, spec)


def _is_tensor(leaf: object) -> bool:
    return hasattr(leaf, "timed")


def _aligned(emit: Callable[..., fx.Node], item: Any, rank: int) -> fx.Node:
    """The tensor with `rank` axes behind time, for broadcasting counts axes from the end."""
    missing = rank - len(item.shape)
    if not item.timed or not missing:
        return item.node  # type: ignore[no-any-return]
    return emit(aten.reshape.default, item.node, [item.node.meta["val"].shape[0], *[1] * missing, *item.shape])


def _timed_equation(equation: str, timed: Sequence[bool]) -> str:
    left, _, result = equation.replace(" ", "").partition("->")
    label = next(letter for letter in "tTabcdefghijklmnopqrsuvwxyz" if letter not in equation)
    terms = [label * is_timed + term for term, is_timed in zip(left.split(","), timed, strict=True)]
    return f"{','.join(terms)}->{label}{result}"


def _vmap(emit: Callable[..., fx.Node], empty: Any, op: Any, leaves: list[Any], spec: Any) -> fx.Node:
    tensors = [leaf for leaf in leaves if _is_tensor(leaf)]

    def call(*given: Tensor) -> Any:
        values = iter(given)
        args, kwargs = pytree.tree_unflatten([next(values) if _is_tensor(leaf) else leaf for leaf in leaves], spec)
        return op(*args, **kwargs)

    over_time = torch.vmap(call, in_dims=tuple(0 if item.timed else None for item in tensors))
    shown = [item.node.meta["val"] for item in tensors]
    body = make_fx(torch.func.functionalize(over_time, remove="mutations"))(
        *(empty(value.shape, value.dtype) for value in shown)
    )
    values = dict(zip(body.graph.find_nodes(op="placeholder"), [item.node for item in tensors], strict=True))
    for step in body.graph.nodes:
        if step.op == "call_function":
            args, kwargs = fx.map_arg((step.args, step.kwargs), values.__getitem__)
            values[step] = emit(aten.reshape.default if step.target in _VIEWS else step.target, *args, **kwargs)
    (output,) = body.graph.find_nodes(op="output")
    result: fx.Node = values[output.args[0]]
    return result
