"""Graph rewrites, in order, each with the reason that it is there."""

import functools
from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

PASSES: tuple[Callable[[ir.Model], object], ...] = (
    # torchlib's own functions become plain operators, which is all that most runtimes know.
    common.InlinePass(),
    # Shapes are fixed, so what torchlib computes from them are constants.
    functools.partial(fold_constants, onnx_shape_inference=True),
    common.RemoveUnusedNodesPass(),
    # The rest is names and order: every constant an initialiser, once; one node for equal ones.
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.DeduplicateInitializersPass(),
    common.CommonSubexpressionEliminationPass(),
    common.RemoveUnusedNodesPass(),
    common.RemoveUnusedOpsetsPass(),
    common.OutputFixPass(),
)


def rewrite(model: ir.Model) -> None:
    """Run every pass, in place."""
    for step in PASSES:
        step(model)
