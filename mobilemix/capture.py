"""From a module to an ExportedProgram: evaluation mode, float32, fixed shapes, no side effects."""

import copy
import traceback

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx._lazy_graph_module import _use_lazy_graph_module

import mobilemix.ops  # noqa: F401, registers the scans
from mobilemix.errors import CaptureError, MobilemixError
from mobilemix.passes.base import arguments, describe_place, source
from mobilemix.passes.make_functional import MakeFunctional


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
        # torch.export writes the graph as Python code after each of its steps, but runs none of them.
        with torch.no_grad(), _use_lazy_graph_module(True):
            program = MakeFunctional()(torch.export.export(model, inputs, strict=False)).program
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
