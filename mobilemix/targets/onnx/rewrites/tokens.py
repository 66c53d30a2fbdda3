"""Pointwise convolutions of short sequences as matrix products, and the transpositions that this takes."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase

from mobilemix.targets.onnx.rewrites import forms
from mobilemix.targets.onnx.rewrites.constants import array, constant
from mobilemix.targets.onnx.rewrites.layouts import PARTS, SWAP, KeepRead, image_of, is_pointwise


class ConvAsProduct(RewriteRuleClassBase):  # type: ignore[misc]
    """Multiply few tokens by weights that a runtime packs once, where a convolution reads them anew for each.

    Before:   (N, C, L) → Conv(kernel 1) → (N, D, L)
    After:    (N, C, L) → Transpose → (N, L, C) @ (C, D) → Add → Transpose → (N, D, L)

    Where `forms.is_product` says so, and not for images, whose convolutions share a layout. The hidden states of
    EfficientViM, one thread: 0.9 of the time at 49 states, 0.7 at 9.
    """

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:  # noqa: D102
        return op.Conv(x, weight, _allow_other_inputs=True, _outputs=["mixed"])

    def check(self, context: Any, x: ir.Value, weight: ir.Value, mixed: ir.Value) -> bool:  # noqa: ARG002, D102
        conv = mixed.producer()
        known = all(array(value) is not None for value in conv.inputs[1:])
        if not known or x.shape is None or not is_pointwise(conv) or conv.attributes.get_int("group", 1) != 1:
            return False
        return image_of(x) is None and forms.is_product(int(x.shape[2]))

    def rewrite(self, op: Any, x: ir.Value, weight: ir.Value, mixed: ir.Value) -> ir.Value:  # noqa: D102
        matrix = op.Constant(value=ir.tensor(np.ascontiguousarray(constant(weight)[:, :, 0].T)))
        tokens = op.MatMul(op.Transpose(x, perm=SWAP), matrix)
        for bias in mixed.producer().inputs[2:]:
            if constant(bias).any():
                tokens = op.Add(tokens, bias)
        result: ir.Value = op.Transpose(tokens, perm=SWAP)
        return result


class SwapProduct(KeepRead):
    """Transpose the factors rather than the product: runtimes multiply by a transposed matrix without moving it.

    Before:   Transpose(a @ b)
    After:    Transpose(b) @ Transpose(a)
    """

    def pattern(self, op: Any, a: Any, b: Any) -> Any:  # noqa: D102
        return op.Transpose(op.MatMul(a, b, _outputs=["product"]), perm=SWAP)

    def check(self, context: Any, a: ir.Value, b: ir.Value, product: ir.Value) -> bool:  # noqa: ARG002, D102
        return all(value.shape is not None and len(value.shape) == len(SWAP) for value in (a, b)) and (
            len(product.uses()) == 1
        )

    def rewrite(self, op: Any, a: ir.Value, b: ir.Value, **_: ir.Value) -> ir.Value:  # noqa: D102
        result: ir.Value = op.MatMul(op.Transpose(b, perm=SWAP), op.Transpose(a, perm=SWAP))
        return result


class Cancel(KeepRead):
    """A transposition and its inverse are none."""

    def pattern(self, op: Any, x: Any) -> Any:  # noqa: D102
        return op.Transpose(op.Transpose(x, perm=SWAP), perm=SWAP)

    def rewrite(self, op: Any, x: ir.Value) -> ir.Value:  # noqa: D102
        result: ir.Value = op.Identity(x)
        return result


class SwapPixels(KeepRead):
    """Pixels before channels are read as such, not by way of an image of channels before pixels.

    Before:   (N, H, W, C) → Transpose → (N, C, H, W) → Reshape → (N, C, H·W) → Transpose → (N, H·W, C)
    After:    (N, H, W, C) → Reshape → (N, H·W, C)
    """

    def pattern(self, op: Any, pixels: Any, shape: Any) -> Any:  # noqa: D102
        image = op.Transpose(pixels, perm=[0, 3, 1, 2])
        return op.Transpose(op.Reshape(image, shape, _outputs=["flat"]), perm=SWAP, _outputs=["tokens"])

    def check(self, context: Any, flat: ir.Value, tokens: ir.Value, **_: ir.Value) -> bool:  # noqa: ARG002, D102
        return image_of(flat) is not None and tokens.shape is not None

    def rewrite(self, op: Any, pixels: ir.Value, tokens: ir.Value, **_: ir.Value) -> ir.Value:  # noqa: D102
        result: ir.Value = op.Reshape(pixels, op.Constant(value_ints=[int(size) for size in tokens.shape]))
        return result


class SwapSplit(RewriteRuleClassBase):  # type: ignore[misc]
    """Split before transposing, so that each part's transposition can meet the next one.

    Before:   x → Transpose → Split(axis 1) → parts
    After:    x → Split(axis 2) → Transpose each → parts
    """

    def __init__(self, parts: int) -> None:
        """Match a Split into `parts`."""
        super().__init__(f"{type(self).__name__}{parts}", remove_nodes=False)
        self._parts = parts

    def pattern(self, op: Any, x: Any, sizes: Any) -> Any:  # noqa: D102
        return op.Split(
            op.Transpose(x, perm=SWAP), sizes, axis=1, _outputs=[f"part{index}" for index in range(self._parts)]
        )

    def check(self, context: Any, sizes: ir.Value, **_: ir.Value) -> bool:  # noqa: ARG002, D102
        content = array(sizes)
        return content is not None and content.size == self._parts

    def rewrite(self, op: Any, x: ir.Value, sizes: ir.Value, **_: ir.Value) -> list[ir.Value]:  # noqa: D102
        parts = op.Split(x, sizes, axis=2, _outputs=self._parts)
        return [op.Transpose(part, perm=SWAP) for part in parts]


class _Elementwise(RewriteRuleClassBase):  # type: ignore[misc]
    """Transpose after an elementwise operator, where it can meet the next transposition."""

    def __init__(self, operator: str) -> None:
        """Match one operator type."""
        super().__init__(f"{type(self).__name__}{operator}", remove_nodes=False)
        self._operator = operator


class SwapUnary(_Elementwise):
    """f(Transpose(x)) is Transpose(f(x))."""

    def pattern(self, op: Any, x: Any) -> Any:  # noqa: D102
        return getattr(op, self._operator)(op.Transpose(x, perm=SWAP))

    def rewrite(self, op: Any, x: ir.Value) -> ir.Value:  # noqa: D102
        result: ir.Value = op.Transpose(getattr(op, self._operator)(x), perm=SWAP)
        return result


class SwapBinary(_Elementwise):
    """f(Transpose(x), Transpose(y)) is Transpose(f(x, y))."""

    def pattern(self, op: Any, x: Any, y: Any) -> Any:  # noqa: D102
        return getattr(op, self._operator)(op.Transpose(x, perm=SWAP), op.Transpose(y, perm=SWAP))

    def rewrite(self, op: Any, x: ir.Value, y: ir.Value) -> ir.Value:  # noqa: D102
        result: ir.Value = op.Transpose(getattr(op, self._operator)(x, y), perm=SWAP)
        return result


class SwapScalar(_Elementwise):
    """f(Transpose(x), c) is Transpose(f(x, c)) for a constant of one element."""

    def pattern(self, op: Any, x: Any, scalar: Any) -> Any:  # noqa: D102
        return getattr(op, self._operator)(op.Transpose(x, perm=SWAP), scalar)

    def check(self, context: Any, scalar: ir.Value, **_: ir.Value) -> bool:  # noqa: ARG002, D102
        content = array(scalar)
        return content is not None and content.size == 1 and content.ndim <= len(SWAP)

    def rewrite(self, op: Any, x: ir.Value, scalar: ir.Value) -> ir.Value:  # noqa: D102
        result: ir.Value = op.Transpose(getattr(op, self._operator)(x, scalar), perm=SWAP)
        return result


CONVS: tuple[RewriteRule, ...] = (ConvAsProduct.rule(),)
TRANSPOSITIONS: tuple[RewriteRule, ...] = (
    Cancel.rule(),
    SwapPixels.rule(),
    SwapProduct.rule(),
    *(SwapSplit.rule(parts) for parts in PARTS),
    *(SwapUnary.rule(operator) for operator in ("Sigmoid", "Relu", "Tanh")),
    *(SwapBinary.rule(operator) for operator in ("Mul", "Add")),
    *(SwapScalar.rule(operator) for operator in ("Mul", "Add")),
)
