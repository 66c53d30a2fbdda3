"""A convolution whose output is only split, as one convolution for each part."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase

from mobilemix.targets.onnx.rewrites.constants import array, constant
from mobilemix.targets.onnx.rewrites.layouts import PARTS


class SeparateConvs(RewriteRuleClassBase):  # type: ignore[misc]
    """Compute q, k and v apart, because taking them apart afterwards copies them.

    Before:   x → Conv(C → 3C) → (N, 3C, H, W) → Split → q, k, v of (N, C, H, W)
    After:    x → Conv(C → C) → q;   x → Conv(C → C) → k;   x → Conv(C → C) → v

    The results are the same bit for bit. Only for images: runtimes leave the layout of their convolutions for a Split,
    which is what it costs; other convolutions' splits are plain copies and cost little.
    CAS-ViT-XS, one thread: 0.94 of the latency.
    """

    def __init__(self, parts: int) -> None:
        """Match a Split into `parts`."""
        super().__init__(f"{type(self).__name__}{parts}")
        self._parts = parts

    def pattern(self, op: Any, x: Any, weight: Any, bias: Any, sizes: Any) -> Any:  # noqa: D102
        whole = op.Conv(x, weight, bias, _outputs=["whole"])
        return op.Split(whole, sizes, axis=1, _outputs=[f"part{index}" for index in range(self._parts)])

    def check(self, context: Any, x: ir.Value, whole: ir.Value, **bound: ir.Value) -> bool:  # noqa: ARG002, D102
        sizes = array(bound["sizes"])
        if sizes is None or sizes.size != self._parts:  # a pattern also matches nodes with fewer outputs
            return False
        grouped = whole.producer().attributes.get_int("group", 1) != 1
        known = all(array(bound[name]) is not None for name in ("weight", "bias"))
        return not grouped and known and x.shape is not None and len(x.shape) == 4

    def rewrite(  # noqa: D102
        self, op: Any, x: ir.Value, weight: ir.Value, bias: ir.Value, sizes: ir.Value, whole: ir.Value, **_: ir.Value
    ) -> list[ir.Value]:
        edges = np.cumsum(constant(sizes))[:-1]
        parts = zip(np.split(constant(weight), edges), np.split(constant(bias), edges), strict=True)
        attributes = whole.producer().attributes
        return [
            op.Conv(x, *(op.Constant(value=ir.tensor(part.copy())) for part in pair), **attributes) for pair in parts
        ]


RULES: tuple[RewriteRule, ...] = tuple(SeparateConvs.rule(parts) for parts in PARTS)
