"""Pointwise convolutions and norms of flattened images, on the images."""

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRule

from mobilemix.targets.onnx.rewrites.constants import array, constant
from mobilemix.targets.onnx.rewrites.layouts import KeepRead, image_of, is_pointwise


class OnImage(KeepRead):
    """Convolve the image rather than the sequence of its pixels: runtimes have a layout for images alone.

    Before:   (N, C, H, W) → Reshape → (N, C, H·W) → Conv(kernel 1) → (N, D, H·W)
    After:    (N, C, H, W) → Conv(kernel 1 × 1) → (N, D, H, W) → Reshape → (N, D, H·W)
    """

    def pattern(self, op: Any, image: Any, shape: Any, weight: Any) -> Any:  # noqa: D102
        flat = op.Reshape(image, shape, _outputs=["flat"])
        return op.Conv(flat, weight, _allow_other_inputs=True, _outputs=["mixed"])

    def check(self, context: Any, flat: ir.Value, weight: ir.Value, mixed: ir.Value, **_: ir.Value) -> bool:  # noqa: ARG002, D102
        bias = mixed.producer().inputs[2:]
        known = all(array(value) is not None for value in (weight, *bias))
        return known and image_of(flat) is not None and is_pointwise(mixed.producer())

    def rewrite(  # noqa: D102
        self, op: Any, image: ir.Value, weight: ir.Value, mixed: ir.Value, **_: ir.Value
    ) -> ir.Value:
        square = op.Constant(value=ir.tensor(constant(weight)[..., None]))
        bias = mixed.producer().inputs[2:]
        whole = op.Conv(image, square, *bias, group=mixed.producer().attributes.get_int("group", 1))
        result: ir.Value = op.Reshape(whole, op.Constant(value_ints=[int(size) for size in mixed.shape]))
        return result


class NormOnImage(KeepRead):
    """Norm the channels of the image, for the same reason: between convolutions the transpositions cost nothing.

    Before:   (N, C, H, W) → Reshape → (N, C, H·W) → Transpose → LayerNormalization → Transpose → (N, C, H·W)
    After:    (N, C, H, W) → Transpose → LayerNormalization → Transpose → (N, C, H, W) → Reshape → (N, C, H·W)
    """

    def pattern(self, op: Any, image: Any, shape: Any, scale: Any) -> Any:  # noqa: D102
        flat = op.Reshape(image, shape, _outputs=["flat"])
        tokens = op.Transpose(flat, perm=[0, 2, 1])
        normalised = op.LayerNormalization(tokens, scale, axis=-1, _allow_other_inputs=True, _outputs=["normalised"])
        return op.Transpose(normalised, perm=[0, 2, 1], _outputs=["back"])

    def check(self, context: Any, flat: ir.Value, **_: ir.Value) -> bool:  # noqa: ARG002, D102
        return image_of(flat) is not None

    def rewrite(self, op: Any, image: ir.Value, normalised: ir.Value, back: ir.Value, **_: ir.Value) -> ir.Value:  # noqa: D102
        norm = normalised.producer()
        pixels = op.LayerNormalization(op.Transpose(image, perm=[0, 2, 3, 1]), *norm.inputs[1:], **norm.attributes)
        whole = op.Transpose(pixels, perm=[0, 3, 1, 2])
        result: ir.Value = op.Reshape(whole, op.Constant(value_ints=[int(size) for size in back.shape]))
        return result


class Reshapes(KeepRead):
    """Two reshapes are one, and none where the shape is again what it was."""

    def pattern(self, op: Any, x: Any, first: Any, second: Any) -> Any:  # noqa: D102
        return op.Reshape(op.Reshape(x, first), second, _outputs=["last"])

    def check(self, context: Any, last: ir.Value, second: ir.Value, **_: ir.Value) -> bool:  # noqa: ARG002, D102
        return last.shape is not None and last.shape.is_static() and array(second) is not None

    def rewrite(self, op: Any, x: ir.Value, last: ir.Value, **_: ir.Value) -> ir.Value:  # noqa: D102
        if x.shape == last.shape:
            same: ir.Value = op.Identity(x)
            return same
        result: ir.Value = op.Reshape(x, op.Constant(value_ints=[int(size) for size in last.shape]))
        return result


NORMS: tuple[RewriteRule, ...] = (NormOnImage.rule(),)
CONVS: tuple[RewriteRule, ...] = (OnImage.rule(),)
RESHAPES: tuple[RewriteRule, ...] = (Reshapes.rule(),)
