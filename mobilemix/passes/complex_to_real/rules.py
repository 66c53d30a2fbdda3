"""Rules of complex tensors outside torch.fft: construction, arithmetic, and whatever acts on each part alone."""

# ruff: noqa: ARG001 (every rule takes the same arguments)

import cmath
import math
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


# Elementary functions


@rule("exp")
def _(call: Call, x: Complex) -> Complex:
    return _exponential(*x.parts)


@rule("exp2")
def _(call: Call, x: Complex) -> Complex:
    return _exponential(x.re * math.log(2), x.im * math.log(2))


@rule("expm1")
def _(call: Call, x: Complex) -> Complex:
    result = _exponential(*x.parts)
    return Complex(result.re - 1.0, result.im)


@rule("log", "log2", "log10")
def _(call: Call, x: Complex) -> Complex:
    per_unit = 1 / math.log({"log2": 2, "log10": 10}.get(call.op._opname, math.e))
    radius, angle = _logarithm(x)
    return Complex(radius * per_unit, angle * per_unit)


@rule("log1p")
def _(call: Call, x: Complex) -> Complex:
    return Complex(*_logarithm(Complex(x.re + 1.0, x.im)))


@rule("sin", "cos", "sinh", "cosh")
def _(call: Call, x: Complex) -> Complex:
    """sinh(a + bi) = sinh a · cos b + i · cosh a · sin b; the others likewise."""
    circular = {name: getattr(aten, name).default for name in ("sin", "cos")}
    hyperbolic = {name: getattr(aten, f"{name}h").default for name in ("sin", "cos")}
    name = call.op._opname[:3]
    other = "cos" if name == "sin" else "sin"
    of_re, of_im = (hyperbolic, circular) if call.op._opname.endswith("h") else (circular, hyperbolic)
    im = x.re.call(of_re[other]) * x.im.call(of_im["sin"])
    return Complex(x.re.call(of_re[name]) * x.im.call(of_im["cos"]), -im if call.op._opname == "cos" else im)


@rule("tanh")
def _(call: Call, x: Complex) -> Complex:
    return _tanh(x)


@rule("tan")
def _(call: Call, x: Complex) -> Complex:
    turned = _tanh(Complex(-x.im, x.re))  # tan z = −i · tanh(i·z)
    return Complex(turned.im, -turned.re)


@rule("sigmoid")
def _(call: Call, x: Complex) -> Complex:
    """s / (s + t · exp(−bi)) with s = sigmoid(a) and t = sigmoid(−a), which neither overflows nor cancels."""
    s, t = x.re.call(aten.sigmoid.default), (-x.re).call(aten.sigmoid.default)
    re, im = s + t * x.im.call(aten.cos.default), t * x.im.call(aten.sin.default)
    scale = s / (re * re + im * im)
    return Complex(scale * re, scale * im)


def _tanh(x: Complex) -> Complex:
    """(tanh 2a + i · s · sin 2b) / (1 + s · cos 2b) with s = 1 / cosh 2a, none of which overflows."""
    a, b = x.re * 2.0, x.im * 2.0
    small = (-a.call(aten.abs.default)).call(aten.exp.default)
    narrow = small * 2.0 / (small * small + 1.0)
    scale = narrow * b.call(aten.cos.default) + 1.0
    return Complex(a.call(aten.tanh.default) / scale, narrow * b.call(aten.sin.default) / scale)


@rule("sqrt", "rsqrt")
def _(call: Call, x: Complex) -> Complex:
    return _power(x, 0.5 if call.op._opname == "sqrt" else -0.5)


@rule("pow")
def _(call: Call, base: Number, exponent: Number) -> Any:
    if isinstance(exponent, complex) and not exponent.imag:
        exponent = exponent.real
    if isinstance(base, Complex) and isinstance(exponent, int | float) and exponent in _PRODUCTS:
        parts: tuple[Part, Part] = base.parts
        for _ in range(int(exponent) - 1):
            parts = _product(parts, base.parts)
        return _finish(call, *parts)
    if isinstance(base, int | float | complex):
        if base == 0:
            return NotImplemented
        radius: Part
        angle: Part
        radius, angle = split(cmath.log(base))
    else:
        z = join(call.edit, *_factor(call, base), base.shape, call.dtype)
        if not isinstance(exponent, Complex | complex):
            return _power(z, exponent.cast(call.dtype) if isinstance(exponent, Real) else float(exponent))
        radius, angle = _logarithm(z)
    re, im = _product((radius, angle), _factor(call, exponent))
    return _exponential(*_finish(call, re, im).parts)


_PRODUCTS = range(1, 5)
"""Exponents of which a power is a product, which is more exact than exponential and logarithm."""


def _power(x: Complex, exponent: Real | float) -> Complex:
    raise_to = aten.pow.Tensor_Tensor if isinstance(exponent, Real) else aten.pow.Tensor_Scalar
    radius = _squared(x).call(raise_to, exponent / 2)
    angle = x.im.call(aten.atan2.default, x.re) * exponent
    return Complex(radius * angle.call(aten.cos.default), radius * angle.call(aten.sin.default))


def _exponential(re: Real, im: Real) -> Complex:
    radius = re.call(aten.exp.default)
    return Complex(radius * im.call(aten.cos.default), radius * im.call(aten.sin.default))


def _logarithm(x: Complex) -> tuple[Real, Real]:
    """log |x| and the angle."""
    return _squared(x).call(aten.log.default) * 0.5, x.im.call(aten.atan2.default, x.re)


@rule("sgn")
def _(call: Call, x: Complex) -> Complex:
    square = _squared(x)
    scale = square.call(aten.rsqrt.default).call(aten.masked_fill.Scalar, square.call(aten.eq.Scalar, 0.0), 0.0)
    return Complex(x.re * scale, x.im * scale)


def _squared(x: Complex) -> Real:
    """|x|²."""
    return x.re * x.re + x.im * x.im


# Reductions and comparisons


@rule("linalg_vector_norm", "norm")
def _(call: Call, x: Complex, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> Real:
    options = {**kwargs, "dtype": real_dtype(dtype)} if dtype else kwargs
    return call.emit(call.op, _squared(x).call(aten.sqrt.default), *args, **options)


@rule("var", "std", "var_mean", "std_mean")
def _(call: Call, x: Complex, *args: Any, **kwargs: Any) -> Any:
    """The variance is real: that of the real part and that of the imaginary part together."""
    if call.op._overloadname != "correction":
        return NotImplemented
    spread, _, with_mean = call.op._opname.partition("_")
    re, im = (call.emit(aten.var.correction, part, *args, **kwargs) for part in x.parts)
    result = re + im if spread == "var" else (re + im).call(aten.sqrt.default)
    if not with_mean:
        return result
    dim, keepdim = args[0] if args else kwargs.get("dim"), kwargs.get("keepdim", False)
    return [result, Complex(*(call.emit(aten.mean.dim, part, dim, keepdim) for part in x.parts))]


@rule("prod")
def _(call: Call, x: Complex, dim: int | None = None, keepdim: bool = False, **_options: Any) -> Complex:
    """A product of halves, of their halves and so on."""
    parts: list[Any] = [part if dim is not None else part.reshape((-1,)) for part in x.parts]
    axis = (dim or 0) % len(parts[0].shape) if parts[0].shape else 0
    size = parts[0].shape[axis] if parts[0].shape else 1
    if size == 0:
        return _finish(call, 1.0, None)
    while size > 1:
        half, rest = size // 2, size % 2
        first, second, last = (
            [part.take(axis, start, stop) for part in parts]
            for start, stop in ((0, half), (half, 2 * half), (2 * half, size))
        )
        product = _product((first[0], first[1]), (second[0], second[1]))
        parts = [
            call.emit(aten.cat.default, [one, other], axis) if rest else one
            for one, other in zip(product, last, strict=True)
        ]
        size = half + rest
    return Complex(*(part.reshape(call.shape) for part in parts))


@rule("cumprod")
def _(call: Call, x: Complex, dim: int, **_options: Any) -> Complex:
    """Hillis and Steele's scan: products of 2, of 4, of 8 … neighbours."""
    parts: list[Any] = list(x.parts)
    axis, size, step = dim % max(len(x.shape), 1), x.shape[dim] if x.shape else 1, 1
    while step < size:
        before, after = ([part.take(axis, *span) for part in parts] for span in ((0, size - step), (step, size)))
        product = _product((before[0], before[1]), (after[0], after[1]))
        parts = [
            call.emit(aten.cat.default, [part.take(axis, 0, step), grown], axis)
            for part, grown in zip(parts, product, strict=True)
        ]
        step *= 2
    return Complex(*parts)


@rule("isnan", "isinf")
def _(call: Call, x: Complex) -> Real:
    return x.re.call(call.op).call(aten.logical_or.default, x.im.call(call.op))


@rule("isfinite")
def _(call: Call, x: Complex) -> Real:
    return x.re.call(call.op).call(aten.logical_and.default, x.im.call(call.op))


@rule("logical_not", "logical_and", "logical_or", "logical_xor", "all", "any", "count_nonzero")
def _(call: Call, *args: Any, **kwargs: Any) -> Real:
    return call.emit(call.op, *(_is_not_zero(x) if isinstance(x, Complex) else x for x in args), **kwargs)


def _is_not_zero(x: Complex) -> Real:
    re, im = (part.call(aten.ne.Scalar, 0.0) for part in x.parts)
    return re.call(aten.logical_or.default, im)


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


@rule("addbmm", "baddbmm")
def _(call: Call, x: Number, a: Number, b: Number, *, beta: complex = 1, alpha: complex = 1) -> Complex:
    def multiply(one: Real, other: Real) -> Real:
        product = call.emit(aten.bmm.default, one, other)
        return product.call(aten.sum.dim_IntList, [0]) if call.op._opname == "addbmm" else product

    product = _bilinear(multiply, split(a), split(b))
    return _finish(call, *map(plus, _product(split(x), split(beta)), _product(product, split(alpha))))


@rule("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _(call: Call, x: Number, weight: Number, bias: Number | None = None, *options: Any, **named: Any) -> Complex:
    product = _bilinear(lambda a, b: call.emit(call.op, a, b, None, *options, **named), split(x), split(weight))
    if bias is None:
        return _finish(call, *product)
    behind = 0 if call.op._opname == "linear" else int(call.op._opname[-2])
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
    reshape flatten unflatten squeeze unsqueeze expand expand_as broadcast_to
    permute transpose t swapaxes swapdims movedim moveaxis mT numpy_T
    slice select narrow index index_select gather take take_along_dim diagonal unfold im2col
    split split_with_sizes chunk unbind tensor_split unsafe_split unsafe_chunk
    cat concat stack hstack vstack roll flip rot90 repeat tile repeat_interleave tril triu diag_embed trace
    pad constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle
    sum mean cumsum copy slice_scatter select_scatter diagonal_scatter
    index_put index_copy index_add index_fill scatter scatter_add put masked_fill masked_scatter
"""
_SELECTORS = ("condition", "index", "indices", "mask", "repeats")
"""Arguments that say which elements are meant, for both parts the same."""
_NUMBER = "value"
"""Argument that may be a Python number, of which each part takes its own."""


@rule(*_EACH_PART.split())
def _(call: Call, *args: Any, **kwargs: Any) -> Any:
    def with_part(index: int) -> Any:
        def choose(item: Any) -> Any:
            if isinstance(item, Complex):
                return item.parts[index]
            if isinstance(item, Real) and index == 1:  # among complex tensors, a real one is complex, too
                return fill(call.edit, None, item.shape, call.dtype)
            return real_dtype(item) if isinstance(item, torch.dtype) else item

        def argument(name: str, item: Any) -> Any:
            if name in _SELECTORS:
                return item
            if name == _NUMBER and isinstance(item, int | float | complex):
                return complex(item).imag if index else complex(item).real
            return pytree.tree_map(choose, item, is_leaf=lambda item: isinstance(item, Real | Complex))

        names = [each.name for each in call.op._schema.arguments]
        part_args = [argument(*pair) for pair in zip(names, args, strict=False)]
        part_kwargs = {name: argument(name, item) for name, item in kwargs.items()}
        result = call.edit.emit(call.op, *nodes(part_args), **nodes(part_kwargs))
        if isinstance(call.value, torch.Tensor):
            return Real(call.edit, result)
        return [Real(call.edit, node) for node in call.edit.items(result)]

    if any(isinstance(item, complex) for item in (kwargs.get("alpha"), kwargs.get("reduce"))):
        return NotImplemented
    re, im = with_part(0), with_part(1)
    return Complex(re, im) if isinstance(re, Real) else [Complex(*pair) for pair in zip(re, im, strict=True)]


@rule("where")
def _(call: Call, condition: Real, *branches: Number) -> Any:
    def chosen(index: int) -> Real:
        parts = [split(branch)[index] for branch in branches]
        shapes = [part.shape if isinstance(part, Real) else () for part in parts]
        tensors = [fill(call.edit, part, shape, call.dtype) for part, shape in zip(parts, shapes, strict=True)]
        return call.emit(aten.where.self, condition, *tensors)

    return Complex(chosen(0), chosen(1)) if branches else NotImplemented


@rule("to", "_to_copy", "type_as")
def _(call: Call, x: Real | Complex, *_args: Any, **_kwargs: Any) -> Real | Complex:
    """Complex to complex and real to complex; a cast from complex to real drops the imaginary part, as torch does."""
    if call.value.dtype == torch.bool and isinstance(x, Complex):
        return _is_not_zero(x)
    parts = [part.cast(call.dtype) for part in (x.parts if isinstance(x, Complex) else (x,))]
    return _finish(call, *parts, *[None] * (2 - len(parts))) if call.value.is_complex() else parts[0]


# Tensors of one number


def _filled(call: Call, value: Number) -> Real | Complex:
    """A tensor of the result's shape and dtype, which need not be complex."""
    re, im = _factor(call, value)
    return _finish(call, re, im) if call.value.is_complex() else fill(call.edit, re, call.shape, call.dtype)


@rule("zeros", "zeros_like", "new_zeros", "zero", "empty", "empty_like", "new_empty", "empty_permuted")
def _(call: Call, *_args: Any, **_kwargs: Any) -> Real | Complex:
    """What is empty has to be overwritten, so its content does not matter."""
    return _filled(call, 0.0)


@rule("ones", "ones_like", "new_ones")
def _(call: Call, *_args: Any, **_kwargs: Any) -> Real | Complex:
    return _filled(call, 1.0)


@rule("full", "full_like", "fill")
def _(call: Call, _like: Any, value: Number, **_kwargs: Any) -> Real | Complex:
    return _filled(call, value)


@rule("new_full")
def _(call: Call, _like: Any, _size: Any, value: Number, **_kwargs: Any) -> Real | Complex:
    return _filled(call, value)


@rule("scalar_tensor")
def _(call: Call, value: complex, **_kwargs: Any) -> Real | Complex:
    return _filled(call, value)


@rule("eye")
def _(call: Call, *size: int, **_kwargs: Any) -> Complex:
    return _finish(call, call.emit(call.op, *size, dtype=call.dtype), None)
