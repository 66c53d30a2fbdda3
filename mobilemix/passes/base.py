"""The contract of a pass: ExportedProgram in, ExportedProgram out, the same function.

A pass is a short file with one subclass of `Pass` and a before/after graph in its docstring. The base class
checks that the interface is kept; tests check each pass alone against eager PyTorch.
"""

import abc
import dataclasses

from torch.export import ExportedProgram

from mobilemix.errors import MobilemixError


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

    @abc.abstractmethod
    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return a program that computes the same function; `modified` False means the very same program."""

    def __call__(self, program: ExportedProgram) -> PassResult:
        """Run the rewrite and check that user-visible names, shapes and dtypes are kept.

        Raises:
            PassError: the interface changed, or an unmodified program is not the one that came in.
        """
        result = self.rewrite(program)
        if not result.modified and result.program is not program:
            raise PassError(f"pass {self.name} returned another program but says that it changed nothing")
        before, after = interface(program), interface(result.program)
        if before != after:
            raise PassError(f"pass {self.name} changed the interface from {before} to {after}")
        return result


def interface(program: ExportedProgram) -> tuple[tuple[object, ...], ...]:
    """User inputs and outputs as (name or position, shape, dtype)."""
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    described: list[tuple[object, ...]] = []
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
