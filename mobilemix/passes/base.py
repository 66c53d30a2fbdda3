"""The contract of a pass: ExportedProgram in, ExportedProgram out, the same function.

A pass is a short file with one subclass of `Pass` and a before/after graph in its docstring. The base class
checks that the interface is kept; tests check each pass alone against eager PyTorch.
"""

import abc
import dataclasses
import linecache
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.errors import MobilemixError

_LIBRARIES = (Path(torch.__file__).parent, Path(__file__).parent.parent / "capture.py")


@dataclasses.dataclass(frozen=True)
class PassResult:
    """What a pass returns: the program, and whether it differs from the one that came in."""

    program: ExportedProgram
    modified: bool


class PassError(MobilemixError):
    """A pass broke its contract (a defect of the pass, not of the user's model)."""


class Pass(abc.ABC):
    """A rewrite of a whole program."""

    name: str

    def keeps(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """What an input or output of this shape and dtype is after the pass: the same, unless a pass declares more."""
        return shape, dtype

    @abc.abstractmethod
    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return a program that computes the same function; `modified` False means the very same program."""

    def __call__(self, program: ExportedProgram) -> PassResult:
        """Run the rewrite and check that user-visible names, shapes and dtypes are kept, as far as the pass says so.

        Raises:
            PassError: the interface changed, or an unmodified program is not the one that came in.
        """
        before = interface(program)
        result = self.rewrite(program)
        if not result.modified and result.program is not program:
            raise PassError(f"pass {self.name} returned another program but says that it changed nothing")
        after = interface(result.program) if result.modified else before
        for was, now in zip(before, after, strict=False):
            if (*was[:2], was[2] and self.keeps(*was[2])) != now:
                raise PassError(f"pass {self.name} changed the interface: {was} became {now}")
        if len(before) != len(after):
            raise PassError(f"pass {self.name} changed the number of inputs and outputs, {len(before)} to {len(after)}")
        return result


def interface(program: ExportedProgram) -> tuple[tuple[str, object, tuple[tuple[int, ...], torch.dtype] | None], ...]:
    """User inputs and outputs as (name or position, shape, dtype)."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    described: list[tuple[str, object, tuple[tuple[int, ...], torch.dtype] | None]] = []
    for kind, names in (
        ("input", program.graph_signature.user_inputs),
        ("output", program.graph_signature.user_outputs),
    ):
        for position, name in enumerate(names):
            value = values.get(str(name))
            # Output nodes are internal names that a rewrite may change; inputs are the user's own.
            label = name if kind == "input" else position
            described.append((kind, label, None if value is None else (tuple(value.shape), value.dtype)))
    return tuple(described)


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ATen node by its schema name, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    values = {item.name: item.default_value for item in schema if item.has_default_value()}
    values.update(zip((item.name for item in schema), node.args, strict=False))
    values.update(node.kwargs)
    return values


def operand(node: fx.Node) -> fx.Node:
    """The first operand of a node, which is a value."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return x


def node_shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's value."""
    return tuple(node.meta["val"].shape)


def source(node: fx.Node) -> str:
    """Where the user's code asked for `node`: "model.py:12 (y = f(x))", or the node's name if torch kept no trace."""
    trace = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return describe_place((file, int(line)) for file, line in trace) or f"node {node.name}"


def describe_place(frames: Iterable[tuple[str, int]]) -> str | None:
    """The innermost of (file, line) outside torch and mobilemix's capture, with its code; None if there is none."""
    users = [(file, line) for file, line in frames if not any(Path(file).is_relative_to(path) for path in _LIBRARIES)]
    if not users:
        return None
    file, line = users[-1]
    code = linecache.getline(file, line).strip()
    return f"{file}:{line} ({code})" if code else f"{file}:{line}"
