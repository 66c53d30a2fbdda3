"""Graph rewrites, in order, each with the reason that it is there: `PASSES` for ONNX Runtime on a CPU.

Another runtime takes `START`, what it wants of the rules, and `END`.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

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
    products,
    separate_convs,
    tokens,
)

Step = Callable[[ir.Model], object]


def apply(*rules: Sequence[RewriteRule]) -> Step:
    """A pass that applies rules once, all together."""
    together = _together(rules)
    return lambda model: together.apply_to_model(model)


def settle(*rules: Sequence[RewriteRule]) -> Step:
    """Apply rules until none of them matches any more, each time knowing the shapes that the last time left."""
    together = _together(rules)
    clean = ir.passes.Sequential(
        common.IdentityEliminationPass(), common.RemoveUnusedNodesPass(), common.ShapeInferencePass()
    )

    def until_none_matches(model: ir.Model) -> None:
        while together.apply_to_model(model):
            clean(model)

    return until_none_matches


def _together(rules: Iterable[Sequence[RewriteRule]]) -> RewriteRuleSet:
    together = RewriteRuleSet([rule for part in rules for rule in part], commute=True)
    for rule in together.rules:
        rule.try_rewrite = _at_its_root(rule)
    return together


def _at_its_root(rule: RewriteRule) -> Callable[..., Any]:
    """The rule's `try_rewrite`, which says no to other operators than its last at once; it takes long to find that."""
    try_rewrite, root = rule.try_rewrite, rule._target_pattern.output_node.op
    return lambda model, graph, node, **options: (
        try_rewrite(model, graph, node, **options) if root.matches(node.op_type) else None
    )


START: tuple[Step, ...] = (
    # torchlib's own functions become plain operators, which is all that most runtimes know.
    common.InlinePass(),
    # Shapes are fixed, so what torchlib computes from them are constants.
    functools.partial(fold_constants, onnx_shape_inference=True),
)

END: tuple[Step, ...] = (
    common.RemoveUnusedNodesPass(),
    # Names and order: every constant an initialiser, once; one node for equal ones.
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    common.DeduplicateInitializersPass(),
    common.CommonSubexpressionEliminationPass(),
    common.RemoveUnusedNodesPass(),
    common.RemoveUnusedOpsetsPass(),
    common.OutputFixPass(),
)

PASSES: tuple[Step, ...] = (
    *START,
    # Each as few kernels as ONNX Runtime can make of it. Independent of one another.
    apply(gelu.RULES, global_average_pool.RULES, separate_convs.RULES, channel_layer_norm.RULES[:1]),
    # What follows a norm, once it is one: the scale before the shift, which ends the chain.
    apply(channel_layer_norm.RULES[1:2]),
    apply(channel_layer_norm.RULES[2:]),
    # What belongs to images, then what does not.
    settle(image_convs.NORMS),
    settle(image_convs.CONVS),
    settle(tokens.CONVS),
    settle(tokens.TRANSPOSITIONS),
    settle(products.ROWS),
    settle(image_convs.RESHAPES),
    settle(products.TRANSPOSITIONS),
    settle(depthwise_channels.CONVS),
    settle(depthwise_channels.SPLITS),
    settle(heads.RULES),
    *END,
)


def rewrite(model: ir.Model, steps: Sequence[Step] = PASSES) -> None:
    """Run every step, in place."""
    for step in steps:
        step(model)
