"""Rules of complex tensors outside torch.fft: construction, arithmetic, and whatever acts on each part alone."""

# ruff: noqa: ARG001 (every rule takes the same arguments)

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from mobilemix.passes.complex_to_real.table import Call, real_dtype, rule
from mobilemix.passes.complex_to_real.values import (
    Complex,
    Number,
    Part,
    Real,
    emit,
    fill,
    join,
    minus,
    nodes,
    plus,
    split,
    times,
)

aten = torch.ops.aten


# Between real and complex


@rule("complex")
def _(call: Call, re: Real, im: Real) -> Complex:
    return Complex(re, im)


@rule("polar")
def _(call: Call, radius: Real, angle: Real) -> Complex:
    return Complex(radius.call(aten.mul.Tensor, angle.call(aten.cos.default)), radius * angle.call(aten.sin.default))


@rule("view_as_complex")
def _(call: Call, x: Real) -> Complex:
    shape = x.shape[:-1]
    return Complex.from_stacked(x, shape, len(shape))


@rule("view_as_real")
def _(call: Call, x: Complex) -> Real:
    return pairs(x)


def pairs(x: Complex) -> Real:
    """(…, 2): both parts along a last axis."""
    if x.stacked and x.stacked[1] == len(x.shape):
        return x.stacked[0].reshape((*x.shape, 2))
    return emit(x.edit, aten.stack.default, list(x.parts), -1)


@rule("real")
def _(call: Call, x: Real | Complex) -> Real:
    return x.re if isinstance(x, Complex) else x


@rule("imag")
def _(call: Call, x: Complex) -> Real:
    return x.im


@rule("conj", "_conj", "_conj_physical", "conj_physical")
def _(call: Call, x: Real | Complex) -> Real | Complex:
    return Complex(x.re, -x.im) if isinstance(x, Complex) else x


@rule("abs")
def _(call: Call, x: Complex) -> Real:
    return _squared(x).call(aten.sqrt.default)


@rule("angle")
def _(call: Call, x: Complex) -> Real:
    return x.im.call(aten.atan2.default, x.re)


# Arithmetic


def _finish(call: Call, re: Part, im: Part) -> Complex:
    return join(call.edit, re, im, call.shape, call.dtype)


@rule("add")
def _(call: Call, a: Number, b: Number, alpha: complex = 1) -> Complex:
    (a_re, a_im), (b_re, b_im) = _factor(call, a), _product(_factor(call, b), split(alpha))
    return _finish(call, plus(a_re, b_re), plus(a_im, b_im))


@rule("sub")
def _(call: Call, a: Number, b: Number, alpha: complex = 1) -> Complex:
    (a_re, a_im), (b_re, b_im) = _factor(call, a), _product(_factor(call, b), split(alpha))
    return _finish(call, minus(a_re, b_re), minus(a_im, b_im))


@rule("rsub")
def _(call: Call, a: Number, b: Number, alpha: complex = 1) -> Complex:
    (a_re, a_im), (b_re, b_im) = _product(split(a), split(alpha)), split(b)
    return _finish(call, minus(b_re, a_re), minus(b_im, a_im))


@rule("neg")
def _(call: Call, x: Complex) -> Complex:
    return Complex(-x.re, -x.im)


@rule("mul")
def _(call: Call, a: Number, b: Number) -> Complex:
    return _finish(call, *_product(_factor(call, a), _factor(call, b)))


@rule("div", "true_divide")
def _(call: Call, a: Number, b: Number) -> Complex:
    (a_re, a_im), (b_re, b_im) = _factor(call, a), _factor(call, b)
    if b_im is None:
        return _finish(call, *(None if part is None else part / b_re for part in (a_re, a_im)))  # type: ignore[operator]
    return _finish(call, *_product((a_re, a_im), _reciprocal(b_re, b_im)))


@rule("reciprocal")
def _(call: Call, x: Complex) -> Complex:
    return _finish(call, *_reciprocal(*x.parts))


@rule("square")
def _(call: Call, x: Complex) -> Complex:
    return _finish(call, *_product(x.parts, x.parts))


@rule("exp")
def _(call: Call, x: Complex) -> Complex:
    radius = x.re.call(aten.exp.default)
    return Complex(radius * x.im.call(aten.cos.default), radius * x.im.call(aten.sin.default))


@rule("log")
def _(call: Call, x: Complex) -> Complex:
    return Complex(_squared(x).call(aten.log.default) * 0.5, x.im.call(aten.atan2.default, x.re))


@rule("sqrt")
def _(call: Call, x: Complex) -> Complex:
    return _power(x, 0.5)


@rule("pow")
def _(call: Call, x: Number, exponent: Number) -> Any:
    if not isinstance(x, Complex) or not isinstance(exponent, int | float):
        return NotImplemented
    if exponent != int(exponent) or not 1 <= exponent <= _LARGEST_PRODUCT:
        return _power(x, float(exponent))
    parts = split(x)
    for _ in range(int(exponent) - 1):
        parts = _product(parts, x.parts)
    return _finish(call, *parts)


_LARGEST_PRODUCT = 4
"""Exponent up to which a power is a product, which is more exact than exponential and logarithm."""


def _power(x: Complex, exponent: float) -> Complex:
    radius = _squared(x).call(aten.pow.Tensor_Scalar, exponent / 2)
    angle = x.im.call(aten.atan2.default, x.re) * exponent
    return Complex(radius * angle.call(aten.cos.default), radius * angle.call(aten.sin.default))


def _squared(x: Complex) -> Real:
    """|x|²."""
    return x.re * x.re + x.im * x.im


@rule("linalg_vector_norm")
def _(call: Call, x: Complex, *args: Any, **kwargs: Any) -> Real:
    return call.emit(call.op, _squared(x).call(aten.sqrt.default), *args, **kwargs)


@rule("eq", "ne")
def _(call: Call, a: Number, b: Number) -> Real:
    both = aten.logical_and if call.op._opname == "eq" else aten.logical_or
    pairs = zip(split(a), split(b), strict=True)
    re, im = (fill(call.edit, x, call.shape, torch.float32).call(call.op, y or 0.0) for x, y in pairs)
    return re.call(both.default, im)


def _factor(call: Call, value: Number) -> tuple[Part, Part]:
    """Both parts of a number; a mask of booleans or integers becomes one of the result's dtype."""
    return split(value.cast(call.dtype) if isinstance(value, Real) else value)


def _product(a: tuple[Part, Part], b: tuple[Part, Part]) -> tuple[Part, Part]:
    return _bilinear(times, a, b)


def _bilinear(multiply: Callable[[Any, Any], Part], a: tuple[Part, Part], b: tuple[Part, Part]) -> tuple[Part, Part]:
    """Both parts of a product that is linear in each factor; absent parts cost nothing."""

    def product(left: Part, right: Part) -> Part:
        return None if left is None or right is None else multiply(left, right)

    (a_re, a_im), (b_re, b_im) = a, b
    return (
        minus(product(a_re, b_re), product(a_im, b_im)),
        plus(product(a_re, b_im), product(a_im, b_re)),
    )


def _reciprocal(re: Part, im: Part) -> tuple[Part, Part]:
    square = plus(times(re, re), times(im, im))
    return None if re is None else re / square, None if im is None else -im / square  # type: ignore[operator]


@rule("matmul", "mm", "bmm", "mv", "dot", "outer")
def _(call: Call, a: Number, b: Number) -> Complex:
    return _finish(call, *_bilinear(lambda x, y: call.emit(call.op, x, y), split(a), split(b)))


@rule("vdot")
def _(call: Call, a: Complex, b: Complex) -> Complex:
    (a_re, a_im), b_parts = split(a), split(b)
    return _finish(call, *_bilinear(lambda x, y: call.emit(aten.dot.default, x, y), (a_re, minus(None, a_im)), b_parts))


@rule("linear", "conv1d", "conv2d", "conv3d")
def _(call: Call, x: Number, weight: Number, bias: Number | None = None, *options: Any) -> Complex:
    product = _bilinear(lambda a, b: call.emit(call.op, a, b, None, *options), split(x), split(weight))
    if bias is None:
        return _finish(call, *product)
    behind = 0 if call.op._opname == "linear" else len(call.shape) - 2
    parts = [part.reshape((-1, *[1] * behind)) if isinstance(part, Real) else None for part in split(bias)]
    return _finish(call, *map(plus, product, parts))


@rule("einsum")
def _(call: Call, equation: str, operands: list[Number], path: Any = None) -> Any:
    if len(operands) == 1:
        return _finish(call, *(part and call.emit(call.op, equation, [part]) for part in split(operands[0])))
    if len(operands) > 2:
        return NotImplemented
    return _finish(call, *_bilinear(lambda a, b: call.emit(call.op, equation, [a, b]), *map(split, operands)))


# What acts on each part alone: linear operators with real coefficients, and those that only move values

_EACH_PART = """
    alias clone contiguous detach lift_fresh_copy resolve_conj resolve_neg
    reshape view _unsafe_view view_copy flatten unflatten squeeze unsqueeze expand expand_as broadcast_to
    permute transpose t swapaxes swapdims movedim moveaxis mT numpy_T
    slice select narrow index index_select gather take_along_dim diagonal unfold
    split split_with_sizes chunk unbind tensor_split unsafe_split unsafe_chunk
    cat concat stack hstack vstack roll flip repeat tile repeat_interleave tril triu
    sum mean cumsum where slice_scatter select_scatter copy
"""


@rule(*_EACH_PART.split())
def _(call: Call, *args: Any, **kwargs: Any) -> Any:
    def with_part(index: int) -> Any:
        def choose(item: Any) -> Any:
            if isinstance(item, Complex):
                return item.parts[index]
            # In an operator on several tensors, a real one is complex with a zero imaginary part.
            if isinstance(item, Real) and index == 1 and item.dtype.is_floating_point:
                return fill(call.edit, None, item.shape, item.dtype)
            return real_dtype(item) if isinstance(item, torch.dtype) else item

        chosen = pytree.tree_map(choose, (args, kwargs), is_leaf=lambda item: isinstance(item, Real | Complex))
        result = call.edit.emit(call.op, *nodes(chosen[0]), **nodes(chosen[1]))
        if isinstance(call.value, torch.Tensor):
            return Real(call.edit, result)
        return [Real(call.edit, node) for node in call.edit.items(result)]

    re, im = with_part(0), with_part(1)
    return Complex(re, im) if isinstance(re, Real) else [Complex(*pair) for pair in zip(re, im, strict=True)]


@rule("to", "_to_copy", "type_as")
def _(call: Call, x: Real | Complex, *_args: Any, **_kwargs: Any) -> Real | Complex:
    """Complex to complex and real to complex; a cast from complex to real drops the imaginary part, as torch does."""
    parts = [part.cast(call.dtype) for part in (x.parts if isinstance(x, Complex) else (x,))]
    return _finish(call, *parts, *[None] * (2 - len(parts))) if call.value.is_complex() else parts[0]


@rule("zeros", "zeros_like", "new_zeros")
def _(call: Call, *_args: Any, **_kwargs: Any) -> Complex:
    return _finish(call, None, None)


@rule("ones", "ones_like", "new_ones")
def _(call: Call, *_args: Any, **_kwargs: Any) -> Complex:
    return _finish(call, 1.0, None)


@rule("full", "full_like")
def _(call: Call, _like: Any, fill_value: complex, **_kwargs: Any) -> Complex:
    return _finish(call, *split(fill_value))


@rule("masked_fill")
def _(call: Call, x: Complex, mask: Real, value: Number) -> Any:
    if not isinstance(value, int | float | complex):
        return NotImplemented
    filled = zip(x.parts, split(value), strict=True)
    return Complex(*(part.call(aten.masked_fill.Scalar, mask, number or 0) for part, number in filled))


@rule("constant_pad_nd")
def _(call: Call, x: Complex, pad: list[int], value: complex = 0) -> Complex:
    parts = zip(x.parts, split(value), strict=True)
    return Complex(*(part.call(aten.constant_pad_nd.default, pad, border or 0) for part, border in parts))


@rule("pad")
def _(call: Call, x: Complex, pad: list[int], mode: str = "constant", value: complex | None = None) -> Complex:
    borders = split(value or 0) if mode == "constant" else (None, None)
    return Complex(
        *(part.call(aten.pad.default, pad, mode, border) for part, border in zip(x.parts, borders, strict=True))
    )
