"""What a captured program takes: names, shapes, dtypes, and which integers its integer inputs may hold."""

import dataclasses
from collections.abc import Iterator

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import arguments

aten = torch.ops.aten

ANY_INTEGER = 2
"""Integers that index no table are drawn below this: masks, flags, positions and counts all take 0 and 1."""

_TABLES = {aten.embedding.default: 0, aten.index_select.default: None, aten.gather.default: None}
"""Operators that look integers up in a tensor: the axis that they index, or None for their argument `dim`."""

_PASSES_ON = frozenset(
    {
        *("alias", "clamp", "clone", "contiguous", "detach", "expand", "expand_as", "flatten", "permute", "reshape"),
        *("select", "slice", "squeeze", "to", "_to_copy", "transpose", "type_as", "unsqueeze", "view"),
    }
)
"""Operators after which an element is still the index that it was."""


@dataclasses.dataclass(frozen=True)
class Input:
    """One input of a program.

    Attributes:
        name: of the argument.
        shape: its size along each axis.
        dtype: its dtype, as torch and numpy call it.
        below: integers that it takes are 0 to `below` − 1.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    below: int = ANY_INTEGER


def inputs_of(program: ExportedProgram) -> tuple[Input, ...]:
    """The user inputs of a program, in order.

    An integer input is bounded by the smallest table that it is looked up in, directly or after operators that only
    move its elements: `embedding`, `index_select`, `gather` and indexing.
    """
    nodes = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
    described = []
    for name in map(str, program.graph_signature.user_inputs):
        value = nodes[name].meta["val"]
        below = min(_tables(nodes[name]), default=ANY_INTEGER)
        described.append(Input(name, tuple(value.shape), dtype_name(value.dtype), below))
    return tuple(described)


def outputs_of(program: ExportedProgram) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Shape and dtype of each tensor among the user outputs of a program, in order."""
    nodes = {node.name: node for node in program.graph.nodes}
    values = [nodes[name].meta["val"] for name in program.graph_signature.user_outputs if isinstance(name, str)]
    return tuple((tuple(value.shape), dtype_name(value.dtype)) for value in values)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _tables(index: fx.Node) -> Iterator[int]:
    """Sizes of the axes that `index` is looked up in."""
    for user in index.users:
        if not isinstance(user.target, torch._ops.OpOverload):
            continue
        values = arguments(user)
        if user.target in _TABLES:
            if index in (values.get("indices"), values.get("index")):
                axis = _TABLES[user.target]
                table = values["weight"] if axis == 0 else values["self"]
                yield table.meta["val"].shape[values["dim"] if axis is None else axis]
        elif user.target is aten.index.Tensor and index in values["indices"]:
            yield values["self"].meta["val"].shape[values["indices"].index(index)]
        elif user.target._opname in _PASSES_ON and values.get("self") is index:
            yield from _tables(user)
