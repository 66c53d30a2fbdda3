"""Matrix products with constant weights, and the transpositions around those of a batch."""

from typing import Any

import onnx_ir as ir

from mobilemix.targets.onnx.rewrites import forms
from mobilemix.targets.onnx.rewrites.constants import array
from mobilemix.targets.onnx.rewrites.layouts import SWAP, KeepRead


class ProductOfAll(KeepRead):
    """Multiply what has more axes as it is: a matrix product takes its rows from all of them.

    Before:   (N, H, W) → Reshape → (N·H, W) @ (W, K)
    After:    (N, H, W) @ (W, K) → Reshape → (N·H, K)
    """

    def pattern(self, op: Any, x: Any, shape: Any, weight: Any) -> Any:  # noqa: D102
        return op.MatMul(op.Reshape(x, shape), weight, _outputs=["product"])

    def check(self, context: Any, x: ir.Value, weight: ir.Value, product: ir.Value, **_: ir.Value) -> bool:  # noqa: ARG002, D102
        content = array(weight)
        known = x.shape is not None and product.shape is not None and len(product.shape) == 2
        return known and content is not None and content.ndim == 2 and x.shape[-1] == len(content)

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, product: ir.Value, **_: ir.Value) -> ir.Value:  # noqa: D102
        rows = op.Constant(value_ints=[int(size) for size in product.shape])
        result: ir.Value = op.Reshape(op.MatMul(x, weight), rows)
        return result


class TransposeWhole(KeepRead):
    """Multiply the columns of many matrices by one, and transpose what holds them all rather than each of them.

    Before:   (N, H, K) → Transpose → (N, K, H) @ (H, J) → Transpose → (N, J, K)
    After:    (N, H, K) → Transpose → (K, N, H) @ (H, J) → Transpose → (N, J, K)

    ONNX Runtime shares the work on every matrix among its threads, one after the other; (K, N, H) is one matrix of
    N·H columns. Where `forms.is_moved_whole` says so. With the product, two threads: 0.27 of the time of 320
    matrices of 16 × 5, 0.6 of 256 of 32 × 9; one thread: 0.82 and 1.0.
    """

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:  # noqa: D102
        return op.Transpose(op.MatMul(op.Transpose(x, perm=SWAP), weight), perm=SWAP, _outputs=["moved"])

    def check(self, context: Any, x: ir.Value, weight: ir.Value, moved: ir.Value) -> bool:  # noqa: ARG002, D102
        content = array(weight)
        if content is None or content.ndim != 2 or x.shape is None or moved.shape is None:
            return False
        count, *before = map(int, x.shape)
        _, *after = map(int, moved.shape)
        return forms.is_moved_whole(count, max(before[0] * before[1], after[0] * after[1]))

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, **_: ir.Value) -> ir.Value:  # noqa: D102
        product = op.MatMul(op.Transpose(x, perm=(2, 0, 1)), weight)
        result: ir.Value = op.Transpose(product, perm=(1, 2, 0))
        return result


ROWS = (ProductOfAll.rule(),)
TRANSPOSITIONS = (TransposeWhole.rule(),)
