"""Rules of torch.fft: a transform along an axis is one real matrix product, or several where that costs less.

`costs` chooses the form. A dense matrix transforms the last axis from the right, (outer, n) @ (n, m), an axis with many
numbers behind it from the left, (m, n) @ (outer, n, inner), one with few between two transpositions. The stages of
`mixed_radix` go from the left. A complex axis of n is one real axis of 2n: the result of one transform has its parts
where the next wants them, so that neighbouring axes need no rearrangement:

    rfft2:   x (B, C, H, W) → @ (W, 2K) → (B·C, 2H, K) → along 2H: (2H, 2H) → [re | im] (B, C, 2, H, K),  K = W // 2 + 1
    irfft2:  [re | im] (B·C, 2H, K) → along 2H: (2H, 2H) → (B·C·H, 2K) → @ (2K, W) → y (B, C, H, W)

The same for a small map is a single product with a matrix for both axes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mobilemix.passes.complex_to_real import costs, dft
from mobilemix.passes.complex_to_real.dft import Transform
from mobilemix.passes.complex_to_real.mixed_radix import Network, is_transposed, network
from mobilemix.passes.complex_to_real.table import Call, rule
from mobilemix.passes.complex_to_real.values import Complex, Real, emit, fill, join

aten = torch.ops.aten

FORWARD, INVERSE = -1, 1
"""Sign of the exponent."""

_Numbers = Literal["real", "complex", "half"]


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
    """Transform axis by axis, or several axes at once; with `to_real` the last step takes half a spectrum."""
    transforms = _transforms(call, x, steps, to_real)
    axes = [step.axis for step in steps]
    if _is_joint(x.shape, axes, transforms):
        return _apply_jointly(call, x, axes, transforms, to_real)
    for position, transform in enumerate(transforms):
        following = axes[position + 1] if position + 1 < len(axes) else None
        x = _apply_one(call, x, axes[position], transform, following, to_real)
    return x


def _transforms(call: Call, x: Real | Complex, steps: Sequence[_Step], to_real: bool) -> list[Transform]:
    found: list[Transform] = []
    for step in steps:
        last = step is steps[-1]
        takes: _Numbers = "half" if to_real and last else "real" if isinstance(x, Real) and not found else "complex"
        size = step.n // 2 + 1 if step.half else step.n
        one_part = last and (to_real or call.real_only)
        found.append(Transform(takes, step.n, x.shape[step.axis], size, one_part, step.sign, step.scale))
    return found


def _is_joint(shape: Sequence[int], axes: list[int], transforms: list[Transform]) -> bool:
    """Whether one matrix for all axes costs less than one operator or more for each."""
    first, last = min(axes), max(axes)
    if len(axes) == 1 or len(set(axes)) < len(axes) or last - first >= len(axes):
        return False
    sizes, separate = list(shape), 0.0
    for axis, transform in zip(axes, transforms, strict=True):
        separate += costs.best(transform, math.prod(sizes[:axis]), math.prod(sizes[axis + 1 :])).cost
        sizes[axis] = transform.size
    inputs = math.prod(shape[first : last + 1]) * (1 if transforms[0].takes == "real" else 2)
    outputs = math.prod(sizes[first : last + 1]) * (1 if transforms[-1].one_part else 2)
    whole = costs.dense(inputs, outputs, math.prod(shape[:first]), math.prod(shape[last + 1 :]))
    return whole.cost < costs.MARGIN * separate


def _apply_jointly(
    call: Call, x: Real | Complex, axes: list[int], transforms: list[Transform], to_real: bool
) -> Real | Complex:
    first, last = min(axes), max(axes)
    matrix = dft.joint(tuple(transforms), tuple(axis - first for axis in axes))
    outer, inner = math.prod(x.shape[:first]), math.prod(x.shape[last + 1 :])
    data = (x if isinstance(x, Real) else stacked(x, first)).reshape((outer, matrix.shape[1], inner))
    shape = list(x.shape)
    for axis, transform in zip(axes, transforms, strict=True):
        shape[axis] = transform.size
    outputs, inputs = matrix.shape
    product = multiply(call, matrix, data, costs.dense(inputs, outputs, outer, inner).around)
    return _result(product, shape, first, transforms[-1], to_real)


def _apply_one(
    call: Call, x: Real | Complex, axis: int, transform: Transform, following: int | None, to_real: bool
) -> Real | Complex:
    outer, inner = math.prod(x.shape[:axis]), math.prod(x.shape[axis + 1 :])
    data, part_axis = (x, axis) if isinstance(x, Real) else along(x, axis)
    data = data.reshape((outer, transform.inputs, inner))
    form = costs.best(transform, outer, inner)
    interleaved_input, interleaved_output = part_axis == axis + 1, not transform.one_part and following == axis + 1
    if len(form.factors) > 1:
        interleaved_output &= not is_transposed(transform, interleaved_input)
        stages = network(transform, form.factors, interleaved_input, interleaved_output)
        product = run(call, stages, data, form.around)
    else:
        matrix = dft.dense(transform)
        matrix = dft.interleaved(matrix, 1) if interleaved_input else matrix
        matrix = dft.interleaved(matrix, 0) if interleaved_output else matrix
        product = multiply(call, matrix, data, form.around)
    shape = (*x.shape[:axis], transform.size, *x.shape[axis + 1 :])
    return _result(product, shape, axis + 1 if interleaved_output else axis, transform, to_real)


def _result(product: Real, shape: Sequence[int], part_axis: int, transform: Transform, to_real: bool) -> Real | Complex:
    if not transform.one_part:
        return Complex.from_stacked(product, shape, part_axis)
    return product.reshape(shape) if to_real else Complex.from_real_part(product.reshape(shape))


def along(x: Complex, axis: int) -> tuple[Real, int]:
    """Both parts in one tensor, side by side with `axis`: (…, 2, n, …) or (…, n, 2, …)."""
    if x.stacked and x.stacked[1] in (axis, axis + 1):
        return x.stacked
    return emit(x.edit, aten.cat.default, list(x.parts), axis), axis


def stacked(x: Complex, axis: int) -> Real:
    """Both parts in one tensor, (…, 2, n, …)."""
    data, part_axis = along(x, axis)
    return data if part_axis == axis else emit(x.edit, aten.cat.default, list(x.parts), axis)


def multiply(call: Call, matrix: Tensor, data: Real, around: bool) -> Real:
    """(outputs, inputs) times (outer, inputs, inner) along the middle axis."""
    outer, inputs, inner = data.shape
    name = f"dft_{matrix.shape[0]}x{matrix.shape[1]}"
    if inner == 1:
        return data.reshape((outer, inputs)).call(aten.mm.default, constant(call, name, matrix.T, data.dtype))
    if outer == 1:
        return constant(call, name, matrix, data.dtype).call(aten.mm.default, data.reshape((inputs, inner)))
    if not around:
        return constant(call, name, matrix, data.dtype).call(aten.matmul.default, data)
    rows = data.call(aten.transpose.int, 1, 2).reshape((outer * inner, inputs))
    product = rows.call(aten.mm.default, constant(call, name, matrix.T, data.dtype))
    return product.reshape((outer, inner, len(matrix))).call(aten.transpose.int, 1, 2)


def run(call: Call, stages: Network, data: Real, around: bool) -> Real:
    """The stages of a transform along the middle axis of (outer, inputs, inner)."""
    outer, inputs, inner = data.shape
    if around:
        moved = data.call(aten.transpose.int, 0, 1) if inner > 1 else data.reshape((outer, inputs)).call(aten.t.default)
        result = run(call, stages, moved.reshape((1, inputs, outer * inner)), False)
        outputs = result.shape[1]
        if inner == 1:
            return result.reshape((outputs, outer)).call(aten.t.default)
        return result.reshape((outputs, outer, inner)).call(aten.transpose.int, 0, 1)
    order = constant(call, f"dft_order_{len(stages.order)}", stages.order, torch.int64)
    if stages.transposed:
        data = data.call(aten.index_select.default, 1, order)
    elif stages.taken != stages.signal or stages.padded != stages.taken:
        data = data.reshape((outer, inputs // stages.signal, stages.signal, inner)).take(2, 0, stages.taken)
        if stages.padded != stages.taken:
            data = data.call(aten.constant_pad_nd.default, [0, 0, 0, stages.padded - stages.taken], 0.0)
    total = math.prod(data.shape) // outer
    for stage in stages.stages:
        groups, rows, columns = stage.shape
        behind = total // (groups * columns)
        batch = [outer] * (outer > 1) + [groups] * (groups > 1)
        matrix = constant(call, f"dft_{groups}x{rows}x{columns}", stage if groups > 1 else stage[0], data.dtype)
        data = matrix.call(aten.matmul.default if batch else aten.mm.default, data.reshape((*batch, columns, behind)))
        total = groups * rows * behind
    data = data.reshape((outer, total // inner, inner))
    return data if stages.transposed else data.call(aten.index_select.default, 1, order)


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
