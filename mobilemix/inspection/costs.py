"""What an exported program costs, node by node, from shapes alone."""

import operator
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mobilemix.inspection.report import Cost, Share
from mobilemix.models.flops import counting


def cost(program: ExportedProgram, shares: Mapping[str, Share]) -> Cost:
    """The cost of a whole program, given `shares` of it."""
    weights = [*_weights(program).values()]
    operators = Counter(operator_name(node) for node in calls(program))
    return Cost(
        operators=dict(operators.most_common()),
        weights=sum(weight.numel() for weight in weights),
        weight_bytes=sum(weight.nbytes for weight in weights),
        multiply_adds=sum(share.multiply_adds for share in shares.values()),
        moved_bytes=sum(share.moved_bytes for share in shares.values()),
    )


def shares(program: ExportedProgram) -> dict[str, Share]:
    """What each module contributes, by its path."""
    constants = _weights(program)
    known: dict[object, int] = {}
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for node in calls(program):
        total = found[_module(node)]
        total[0] += 1
        total[1] += _multiply_adds(node, known)
        total[2] += 0 if _is_view(node) else _moved(node, constants)
    return {module: Share(*total) for module, total in found.items()}


def calls(program: ExportedProgram) -> Iterator[fx.Node]:
    """The nodes that compute something."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            yield node


def operator_name(node: fx.Node) -> str:
    """ "conv2d" for aten.conv2d.default; operators of other libraries with their namespace."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._opname if target.namespace == "aten" else f"{target.namespace}::{target._opname}"
    return getattr(target, "__name__", str(target))


def _weights(program: ExportedProgram) -> dict[str, Tensor]:
    """Names of placeholders → the parameters, buffers and constants that they stand for."""
    values = {**program.constants, **program.state_dict}
    specs = program.graph_signature.input_specs
    found = {spec.arg.name: values.get(spec.target) for spec in specs if spec.target is not None}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def _multiply_adds(node: fx.Node, known: dict[object, int]) -> int:
    """Computed on the node's fake values; `known` holds what calls of the same shapes took."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: item.meta.get("val"))
    leaves, structure = pytree.tree_flatten((args, kwargs))
    key = (node.target, str(structure), *(_described(leaf) for leaf in leaves))
    if key not in known:
        if isinstance(node.target, torch._ops.OpOverload):
            with torch.no_grad(), counting() as counter:
                node.target(*args, **kwargs)
            known[key] = counter.macs
        else:  # a higher-order operator: what its branches cost is not known
            known[key] = 0
    return known[key]


def _described(leaf: Any) -> object:
    return (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else str(leaf)


def _moved(node: fx.Node, constants: Mapping[str, Tensor]) -> int:
    values = [node.meta.get("val"), *(x.meta.get("val") for x in node.all_input_nodes if x.name not in constants)]
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def _is_view(node: fx.Node) -> bool:
    """Whether the result shares memory with an input."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(value.alias_info is not None for value in node.target._schema.returns)


def _module(node: fx.Node) -> str:
    """The path of the innermost module of the user's own: torch's modules count as a part of it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    own = [path for path, kind in stack if not _type_name(kind).startswith("torch.nn.")]
    return own[-1] if own else ""


def _type_name(kind: Any) -> str:
    """Of a module's class, which torch keeps as the class or as its name."""
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)
