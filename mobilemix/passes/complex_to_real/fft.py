"""Rules of torch.fft: a transform along an axis is one real matrix product.

The last axis is transformed from the right, (outer, n) @ (n, m), an axis with many numbers behind it from the left,
(m, n) @ (outer, n, inner), one with few between two transpositions. A complex axis of n is one real axis of 2n: the
result of one transform has its parts where the next wants them, so that neighbouring axes need no rearrangement:

    rfft2:   x (B, C, H, W) → @ (W, 2K) → (B·C, 2H, K) → along 2H: (2H, 2H) → [re | im] (B, C, 2, H, K),  K = W // 2 + 1
    irfft2:  [re | im] (B·C, 2H, K) → along 2H: (2H, 2H) → (B·C·H, 2K) → @ (2K, W) → y (B, C, H, W)
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mobilemix.passes.complex_to_real import dft
from mobilemix.passes.complex_to_real.table import Call, rule
from mobilemix.passes.complex_to_real.values import Complex, Real, emit, fill, join

aten = torch.ops.aten

FORWARD, INVERSE = -1, 1
"""Sign of the exponent."""

_WIDE = 48
"""Numbers behind an axis from which many small products cost less than two transpositions around a large one.

ONNX Runtime, one thread, any n from 8 to 128: 0.4 of the time at 5 numbers, 0.6 at 17, 0.9 at 33, 1.2 at 65.
"""


@dataclasses.dataclass(frozen=True)
class _Step:
    """A transform of length n along one axis; `half` keeps (or takes) only the spectrum's first n // 2 + 1 entries."""

    axis: int
    n: int
    sign: int
    scale: float
    half: bool = False


def _scale(n: int, norm: str | None, sign: int) -> float:
    unscaled = {FORWARD: "backward", INVERSE: "forward"}[sign]
    norm = norm or "backward"
    return 1.0 if norm == unscaled else n**-0.5 if norm == "ortho" else 1 / n


def _apply(call: Call, x: Real | Complex, steps: Sequence[_Step], to_real: bool) -> Real | Complex:
    """Transform axis by axis; with `to_real` the last step makes a real signal of a half spectrum."""
    for position, step in enumerate(steps):
        following = steps[position + 1].axis if position + 1 < len(steps) else None
        x = _apply_one(call, x, step, following, to_real and following is None)
    return x


def _apply_one(call: Call, x: Real | Complex, step: _Step, following: int | None, to_real: bool) -> Real | Complex:
    axis, signal = step.axis, x.shape[step.axis]
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    if isinstance(x, Real):
        outputs = step.n // 2 + 1 if step.half else step.n
        matrix = dft.real_to_complex(signal, step.n, outputs, step.sign, step.scale)
        data = x.reshape((outer, signal, inner))
    else:
        outputs = step.n
        make = dft.complex_to_real if to_real else dft.complex_to_complex
        matrix = make(signal, step.n, step.sign, step.scale)
        data, part_axis = along(x, axis)
        data = data.reshape((outer, 2 * signal, inner))
        if part_axis == axis + 1:
            matrix = dft.interleaved(matrix, 1)
    part_axis = axis + 1 if following == axis + 1 else axis
    if not to_real and part_axis == axis + 1:
        matrix = dft.interleaved(matrix, 0)
    shape = (*x.shape[:axis], outputs, *x.shape[axis + 1 :])
    if call.real_only and following is None and not to_real:
        return Complex.from_real_part(_multiply(call, matrix[:outputs], data).reshape(shape))
    product = _multiply(call, matrix, data)
    return product.reshape(shape) if to_real else Complex.from_stacked(product, shape, part_axis)


def along(x: Complex, axis: int) -> tuple[Real, int]:
    """Both parts in one tensor, side by side with `axis`: (…, 2, n, …) or (…, n, 2, …)."""
    if x.stacked and x.stacked[1] in (axis, axis + 1):
        return x.stacked
    return emit(x.edit, aten.cat.default, list(x.parts), axis), axis


def _multiply(call: Call, matrix: Tensor, data: Real) -> Real:
    """(outputs, inputs) times (outer, inputs, inner) along the middle axis."""
    outer, inputs, inner = data.shape
    name = f"dft_{matrix.shape[0]}x{matrix.shape[1]}"
    if inner == 1:
        return data.reshape((outer, inputs)).call(aten.mm.default, constant(call, name, matrix.T, data.dtype))
    if outer == 1:
        return constant(call, name, matrix, data.dtype).call(aten.mm.default, data.reshape((inputs, inner)))
    if inner >= _WIDE:
        return constant(call, name, matrix, data.dtype).call(aten.matmul.default, data)
    rows = data.call(aten.transpose.int, 1, 2).reshape((outer * inner, inputs))
    product = rows.call(aten.mm.default, constant(call, name, matrix.T, data.dtype))
    return product.reshape((outer, inner, len(matrix))).call(aten.transpose.int, 1, 2)


def constant(call: Call, name: str, tensor: Tensor, dtype: torch.dtype) -> Real:
    """A buffer of the program that holds `tensor` in `dtype`."""
    return Real(call.edit, call.edit.add_constant(name, tensor.to(dtype)))


def _axes(
    x: Real | Complex, lengths: Sequence[int] | None, dim: Sequence[int] | None, last_from_half: bool
) -> list[tuple[int, int]]:
    """(axis, length) of an n-dimensional transform, by torch.fft's rules for absent arguments."""
    rank = len(x.shape)
    if dim is None:
        dim = range(rank) if lengths is None else range(rank - len(lengths), rank)
    axes = [axis % rank for axis in dim]
    given = [-1] * len(axes) if lengths is None else list(lengths)
    sizes = [x.shape[axis] if n == -1 else n for axis, n in zip(axes, given, strict=True)]
    if last_from_half and given[-1] == -1:
        sizes[-1] = 2 * (x.shape[axes[-1]] - 1)
    return list(zip(axes, sizes, strict=True))


def _plain(call: Call, x: Real | Complex, axes: list[tuple[int, int]], scale: Callable[[int], float], sign: int) -> Any:
    """fft and ifft along axes: from the last to the first, or from the first if the parts lie beside it already."""
    if not axes:
        return x if isinstance(x, Complex) else join(call.edit, x, None, x.shape, x.dtype)
    steps = [_Step(axis, n, sign, scale(n)) for axis, n in sorted(axes, reverse=True)]
    first = steps[-1].axis
    if isinstance(x, Complex) and x.stacked and x.stacked[1] in (first, first + 1):
        steps.reverse()
    return _apply(call, x, steps, to_real=False)


def _to_half(call: Call, x: Real, axes: list[tuple[int, int]], scale: Callable[[int], float], sign: int) -> Any:
    """rfft and ihfft: the last axis keeps half its spectrum, then the others are transformed."""
    first, *rest = [_Step(axis, n, sign, scale(n)) for axis, n in reversed(axes)]
    return _apply(call, x, [dataclasses.replace(first, half=True), *rest], to_real=False)


def _from_half(
    call: Call, x: Real | Complex, axes: list[tuple[int, int]], scale: Callable[[int], float], sign: int
) -> Any:
    """irfft and hfft: the others are transformed, then the last axis becomes real."""
    if isinstance(x, Real):
        x = Complex(x, fill(call.edit, None, x.shape, x.dtype))
    return _apply(call, x, [_Step(axis, n, sign, scale(n)) for axis, n in axes], to_real=True)


_KINDS = {
    "fft": (_plain, FORWARD),
    "ifft": (_plain, INVERSE),
    "rfft": (_to_half, FORWARD),
    "ihfft": (_to_half, INVERSE),
    "irfft": (_from_half, INVERSE),
    "hfft": (_from_half, FORWARD),
}


def _register(kind: str) -> None:
    transform, sign = _KINDS[kind]
    from_half = transform is _from_half

    def over_axes(call: Call, x: Any, s: Any = None, dim: Any = None, norm: str | None = None) -> Any:
        return transform(call, x, _axes(x, s, dim, from_half), lambda n: _scale(n, norm, sign), sign)

    @rule(f"fft_{kind}")
    def one(call: Call, x: Any, n: int | None = None, dim: int = -1, norm: str | None = None) -> Any:
        return over_axes(call, x, None if n is None else [n], [dim], norm)

    @rule(f"fft_{kind}2")
    def two(call: Call, x: Any, s: Any = None, dim: Sequence[int] = (-2, -1), norm: str | None = None) -> Any:
        return over_axes(call, x, s, dim, norm)

    rule(f"fft_{kind}n")(over_axes)


for _kind in _KINDS:
    _register(_kind)


def _scale_by(normalization: int) -> Callable[[int], float]:
    return lambda n: (1.0, n**-0.5, 1 / n)[normalization]


@rule("_fft_r2c")
def _(call: Call, x: Real, dim: list[int], normalization: int, onesided: bool) -> Any:
    transform = _to_half if onesided else _plain
    return transform(call, x, _axes(x, None, dim, False), _scale_by(normalization), FORWARD)


@rule("_fft_c2c")
def _(call: Call, x: Complex, dim: list[int], normalization: int, forward: bool) -> Any:
    return _plain(call, x, _axes(x, None, dim, False), _scale_by(normalization), FORWARD if forward else INVERSE)


@rule("_fft_c2r")
def _(call: Call, x: Complex, dim: list[int], normalization: int, last_dim_size: int) -> Any:
    lengths = [*[-1] * (len(dim) - 1), last_dim_size]
    return _from_half(call, x, _axes(x, lengths, dim, True), _scale_by(normalization), INVERSE)


@rule("fft_fftfreq", "fft_rfftfreq")
def _(call: Call, n: int, d: float = 1.0, **_options: Any) -> Real:
    values = (torch.fft.rfftfreq if "rfft" in call.op._schema.name else torch.fft.fftfreq)(n, d, dtype=torch.float64)
    return constant(call, "fftfreq", values, call.dtype)
