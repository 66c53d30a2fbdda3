"""From a module to an ExportedProgram: evaluation mode, float32, fixed shapes, no side effects."""

import copy
import traceback
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind

import mobilemix.ops  # noqa: F401, registers the scans
from mobilemix.errors import CaptureError, MobilemixError
from mobilemix.passes.base import arguments, describe_place, source

aten = torch.ops.aten


def capture(module: nn.Module, example: tuple[Tensor, ...]) -> ExportedProgram:
    """Capture `module` at the shapes of `example`.

    The module is left as it is: a float32 copy in evaluation mode is captured. Inputs are named after the arguments of
    its `forward`; parameters, buffers and the structure of the outputs (a tensor, or tuples, lists and dicts of them,
    nested) keep their names. Composite operators stay whole; those that write into a tensor are made functional.

    Args:
        module: any module without control flow that depends on data.
        example: one tensor per positional argument of `forward`; floating-point ones are converted to float32.

    Raises:
        CaptureError: `torch.export` refused the module, or what it captured draws random numbers, normalises with batch
            statistics, or changes its inputs or buffers, although it is in evaluation mode.
    """
    model = copy.deepcopy(module).eval()._apply(_narrow).requires_grad_(False)  # type: ignore[no-untyped-call]
    inputs = tuple(_narrow(value.detach()) for value in example)
    try:
        with torch.no_grad():
            program = torch.export.export(model, inputs, strict=False)
            if not _functionalise(program.graph):
                program = program.run_decompositions({})
    except MobilemixError:
        raise  # our backbones say themselves what they cannot take
    except Exception as error:  # besides its own errors, torch.export raises whatever the user's forward raises
        raise CaptureError(_explain(error)) from error
    _refuse_training(program)
    return program


def _narrow(value: Tensor) -> Tensor:
    if value.is_complex():
        return value.to(torch.complex64)
    return value.float() if value.is_floating_point() else value


def _functionalise(graph: fx.Graph) -> bool:
    """Replace operators that write into a tensor, or a slice of it, by ones that return a new one.

    False if one is left: what it writes may be read through another view. `run_decompositions` handles any program, but
    takes batch norm and others apart, so it is the second choice.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        functional = _functional(node.target)
        base, views = node.args[0], []
        while isinstance(base, fx.Node) and base.target in _SCATTERS:
            views.append(base)
            base = base.args[0]
        if functional is None or not isinstance(base, fx.Node) or base.op != "call_function" or _aliases(base):
            return False
        seen_again = [
            view for view in _views(base) if order[view] < order[node] and _last_use(view, order) > order[node]
        ]
        if seen_again or (views and any(_writes(user) for user in node.users)):
            return False
        node.target = functional
        whole = node
        for view in views:
            with graph.inserting_after(whole):
                whole = graph.call_function(_SCATTERS[view.target], (view.args[0], whole, *view.args[1:]), view.kwargs)
            whole.meta = {**node.meta, "val": view.args[0].meta["val"]}  # type: ignore[union-attr]
            order[whole] = order[node]
        for user in list(base.users):
            if order[user] > order[node]:
                user.replace_input_with(base, whole)
    return True


_SCATTERS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
}


def _functional(op: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    """aten.add for aten.add_, and so on; None where there is none."""
    name = op._opname
    packet = getattr(aten, name[:-1], None) if op.namespace == "aten" and name.endswith("_") else None
    return getattr(packet, op._overloadname, None)


def _views(node: fx.Node) -> list[fx.Node]:
    """What may share memory with `node`, directly or through others, besides itself."""
    direct = [user for user in node.users if user.op == "call_function" and _aliases(user)]
    return direct + [view for user in direct for view in _views(user)]


def _last_use(node: fx.Node, order: dict[fx.Node, int]) -> int:
    return max((order[user] for user in node.users), default=-1)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _aliases(node: fx.Node) -> bool:
    """Whether the node's value may share memory with its input."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op != "output"
    return any(value.alias_info is not None for value in node.target._schema.returns)


def _refuse_training(program: ExportedProgram) -> None:
    for spec in program.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"the model changes {spec.target or 'an input'} when it runs; return the new value instead"
            )
    for node in program.graph.nodes:
        if not isinstance(node.target, torch._ops.OpOverload):
            continue
        values = arguments(node)
        if values.get("training", values.get("train")) is True:
            raise CaptureError(
                f"{node.target} at {source(node)} runs in training mode although the model is in evaluation mode;"
                " pass training=self.training, or keep running statistics"
            )
        is_random = torch.Tag.nondeterministic_seeded in node.target.tags
        if is_random and "train" not in values and values.get("dropout_p", 1.0) != 0.0:
            raise CaptureError(f"{node.target} at {source(node)} draws random numbers; make it an input of the model")


def _explain(error: Exception) -> str:
    """One line: what was raised, and the innermost place of it outside torch."""
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    place = describe_place(frames)
    return f"torch.export could not capture the model: {type(error).__name__}: {reason}" + (
        f" (at {place})" if place else ""
    )
