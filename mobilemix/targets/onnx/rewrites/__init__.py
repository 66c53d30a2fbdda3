"""Graph rewrites, in order, each with the reason that it is there."""

import functools
from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewriteRule, RewriteRuleSet

from mobilemix.targets.onnx.rewrites import (
    channel_layer_norm,
    depthwise_channels,
    gelu,
    global_average_pool,
    heads,
    image_convs,
    separate_convs,
    tokens,
)


def _apply(*rules: Sequence[RewriteRule]) -> Callable[[ir.Model], object]:
    together = RewriteRuleSet([rule for part in rules for rule in part], commute=True)
    return lambda model: together.apply_to_model(model)


def _settle(*rules: Sequence[RewriteRule]) -> Callable[[ir.Model], object]:
    """Apply rules until none of them matches any more, each time knowing the shapes that the last time left."""
    together = RewriteRuleSet([rule for part in rules for rule in part], commute=True)
    clean = ir.passes.Sequential(
        common.IdentityEliminationPass(), common.RemoveUnusedNodesPass(), common.ShapeInferencePass()
    )

    def settle(model: ir.Model) -> None:
        while together.apply_to_model(model):
            clean(model)

    return settle


PASSES: tuple[Callable[[ir.Model], object], ...] = (
    # torchlib's own functions become plain operators, which is all that most runtimes know.
    common.InlinePass(),
    # Shapes are fixed, so what torchlib computes from them are constants.
    functools.partial(fold_constants, onnx_shape_inference=True),
    # Each as few kernels as ONNX Runtime can make of it. Independent of one another.
    _apply(gelu.RULES, global_average_pool.RULES, separate_convs.RULES, channel_layer_norm.RULES[:1]),
    # What follows a norm, once it is one: the scale before the shift, which ends the chain.
    _apply(channel_layer_norm.RULES[1:2]),
    _apply(channel_layer_norm.RULES[2:]),
    # What belongs to images, then what does not.
    _settle(image_convs.NORMS),
    _settle(image_convs.CONVS),
    _settle(tokens.CONVS),
    _settle(tokens.TRANSPOSITIONS),
    _settle(image_convs.RESHAPES),
    _settle(depthwise_channels.CONVS),
    _settle(depthwise_channels.SPLITS),
    _settle(heads.RULES),
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
