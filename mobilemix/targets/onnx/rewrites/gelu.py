"""GELU in the order of operations that ONNX Runtime recognises."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase


class Gelu(RewriteRuleClassBase):  # type: ignore[misc]
    """Multiply by x before rather than after the half, which is how ONNX Runtime's fusion knows it.

    Before, five kernels:   x · (0.5 · (erf(x / √2) + 1))
    After, one kernel:      (x · 0.5) · (erf(x / √2) + 1)

    CAS-ViT-XS and DualToken-ViT, one thread: 0.84 of the latency.
    """

    def pattern(self, op: Any, x: Any) -> Any:  # noqa: D102
        return op.Mul(x, op.Mul(0.5, op.Add(op.Erf(op.Div(x, 2**0.5)), 1.0)))

    def rewrite(self, op: Any, x: ir.Value) -> ir.Value:  # noqa: D102
        def scalar(value: float) -> ir.Value:
            return op.Constant(value=ir.tensor(value, dtype=x.dtype))

        result: ir.Value = op.Mul(op.Mul(x, scalar(0.5)), op.Add(op.Erf(op.Div(x, scalar(2**0.5))), scalar(1.0)))
        return result


RULES: tuple[RewriteRule, ...] = (Gelu.rule(),)
