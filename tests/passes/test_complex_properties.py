"""Random compositions of complex operators and Fourier transforms, against eager PyTorch in float64.

A composition is drawn with a value in hand, so that each step fits the shape and kind of what came before. Every step
is well-conditioned and continuous on numbers of magnitude up to 1, to which values are scaled after it: an error is
then an error of the rewrite, and not rounding that eager float32 shows as well.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from passes_checks import assert_real
from torch import Tensor, nn

from mobilemix.capture import capture
from mobilemix.passes import lower

TOLERANCE = 2e-5
"""Largest error of any element; all are at most 1."""
LARGEST = 4000
"""Elements beyond which a composition takes no step that grows."""

Draw = st.DrawFn
Step = Callable[[Tensor], Tensor]


def dims(draw: Draw, value: Tensor, least: int = 1) -> list[int]:
    return draw(st.permutations(range(-value.ndim, 0)))[: draw(st.integers(least, value.ndim))]


def dim(draw: Draw, value: Tensor) -> int:
    return draw(st.integers(-value.ndim, value.ndim - 1))


# Each takes a value of at least one axis, complex or (below) real, and draws a step for it.

COMPLEX: dict[str, Callable[[Draw, Tensor], Step]] = {}
REAL: dict[str, Callable[[Draw, Tensor], Step]] = {}


def fixed(table: dict[str, Callable[[Draw, Tensor], Step]], **steps: Step) -> None:
    """Steps that need no drawing."""
    table.update({name: (lambda draw, value, step=step: step) for name, step in steps.items()})


def drawn(*tables: dict[str, Callable[[Draw, Tensor], Step]]) -> Callable[[Any], Any]:
    def register(function: Callable[[Draw, Tensor], Step]) -> Callable[[Draw, Tensor], Step]:
        for table in tables:
            table[function.__name__] = function
        return function

    return register


fixed(
    COMPLEX,
    absolute=lambda z: z.abs(),
    conjugate=lambda z: z * z.conj() + z.conj().resolve_conj(),
    angle=lambda z: (z + 2).angle(),
    clip=lambda z: torch.where(z.abs() > 0.5, z / z.abs().clamp_min(0.5) * 0.5, z),
    constants=lambda z: 1j - z * (2 - 1j) / (1 + 2j) + 0.5,
    cosine=lambda z: z.cos() - z.cosh(),
    each_part=lambda z: torch.complex(z.imag, -z.real),
    exponential=lambda z: torch.exp(z) - torch.expm1(-z),
    imaginary=lambda z: z.imag,
    kinds=lambda z: torch.add(z, z.real, alpha=2) - torch.sub(z.imag, z, alpha=1j),
    logarithm=lambda z: torch.log(z + 2) + torch.log10(z + 3),
    mixed=lambda z: torch.addcmul(z, z.conj(), z, value=0.5),
    polar=lambda z: torch.polar(z.abs(), (z + 2).angle()),
    powers=lambda z: z**3 + (z + 2) ** 0.3 + (z + 2) ** -1 + 2**z + (z + 2) ** z,
    quotient=lambda z: z / (z + 2) + 1 / (z + 2j) + z.real / (z - 2),
    real=lambda z: z.real,
    roots=lambda z: (z + 2).sqrt() + torch.rsqrt(z + 2),
    shrink=lambda z: torch.view_as_complex(nn.functional.softshrink(torch.view_as_real(z), 0.1)),
    sigmoid=lambda z: torch.sigmoid(z) + nn.functional.silu(z),
    sign=lambda z: torch.sgn(z + 2),
    sine=lambda z: z.sin() - z.sinh() * z.square(),
    tangent=lambda z: torch.tanh(z) + torch.tan(0.5 * z),
    viewed=lambda z: torch.view_as_complex(torch.view_as_real(z) * 0.5) + torch.zeros_like(z) + torch.full((1,), 2j),
    wider=lambda z: z.to(torch.complex128) + torch.ones_like(z).detach().clone(),
)
fixed(
    REAL,
    cast=lambda x: x.to(torch.complex128 if x.dtype == torch.float64 else torch.complex64),
    complex=lambda x: torch.complex(x, 1 - x),
    imaginary=lambda x: 1j * x + x,
    polar=lambda x: torch.polar(x.square(), 3 * x),
    turned=lambda x: torch.exp(2j * x),
    where=lambda x: torch.where(torch.arange(x.shape[-1]) % 2 == 0, x, 1 - 2j),
)


@drawn(COMPLEX, REAL)
def transform(draw: Draw, value: Tensor) -> Step:
    names = ["fft", "ifft", "hfft", "irfft"] if value.is_complex() else ["fft", "ifft", "rfft", "ihfft"]
    name = draw(st.sampled_from(names))
    axis, n = dim(draw, value), draw(st.none() | st.integers(1, 9))
    if name in ("hfft", "irfft") and n is None and value.shape[axis] < 2:
        n = 3
    norm = draw(st.sampled_from([None, "backward", "ortho", "forward"]))
    return lambda x: getattr(torch.fft, name)(x, n=n, dim=axis, norm=norm)


@drawn(COMPLEX, REAL)
def transform_of_axes(draw: Draw, value: Tensor) -> Step:
    names = ["fftn", "ifftn", "hfftn", "irfftn"] if value.is_complex() else ["fftn", "ifftn", "rfftn", "ihfftn"]
    name = draw(st.sampled_from(names))
    axes = dims(draw, value)
    sizes = draw(st.none() | st.lists(st.integers(1, 6), min_size=len(axes), max_size=len(axes)))
    if name in ("hfftn", "irfftn") and sizes is None and value.shape[axes[-1]] < 2:
        sizes = [3] * len(axes)
    norm = draw(st.sampled_from([None, "backward", "ortho", "forward"]))
    return lambda x: getattr(torch.fft, name)(x, s=sizes, dim=axes, norm=norm)


@drawn(COMPLEX)
def shift(draw: Draw, value: Tensor) -> Step:
    axes = draw(st.none() | st.just(dims(draw, value)))
    back = draw(st.booleans())
    return lambda x: (torch.fft.ifftshift if back else torch.fft.fftshift)(x, dim=axes)


@drawn(COMPLEX, REAL)
def weighted(draw: Draw, value: Tensor) -> Step:
    frequencies = draw(st.booleans())
    return lambda x: x * (torch.fft.fftfreq(x.shape[-1]) if frequencies else torch.linspace(0, 1, x.shape[-1]) + 1j)


@drawn(COMPLEX)
def permuted(draw: Draw, value: Tensor) -> Step:
    order = draw(st.permutations(range(value.ndim)))
    return lambda x: x.permute(order).contiguous()


@drawn(COMPLEX)
def reshaped(draw: Draw, value: Tensor) -> Step:
    axis = dim(draw, value)
    if value.ndim < 4 and draw(st.booleans()):
        return lambda x: x.unflatten(axis, (1, -1)).unsqueeze(0).squeeze(0)
    return lambda x: x.flatten(min(axis % x.ndim, 1)).view(x.numel())


@drawn(COMPLEX, REAL)
def sliced(draw: Draw, value: Tensor) -> Step:
    axis = dim(draw, value)
    start = draw(st.integers(0, value.shape[axis] - 1))
    stop, step = draw(st.integers(start + 1, value.shape[axis])), draw(st.integers(1, 2))
    index = (*[slice(None)] * (axis % value.ndim), slice(start, stop, step))
    return lambda x: x[index]


@drawn(COMPLEX)
def indexed(draw: Draw, value: Tensor) -> Step:
    axis = dim(draw, value)
    places = torch.tensor(draw(st.lists(st.integers(0, value.shape[axis] - 1), min_size=1, max_size=4)))
    which = draw(st.integers(0, 2))
    if which == 0:
        return lambda x: x.index_select(axis, places)
    if which == 1:
        shape = [-1 if each == axis % value.ndim else 1 for each in range(value.ndim)]
        return lambda x: torch.take_along_dim(x, places.reshape(shape), axis)
    return lambda x: x.movedim(axis, 0)[places]


@drawn(COMPLEX)
def assigned(draw: Draw, value: Tensor) -> Step:
    axis = dim(draw, value) % value.ndim
    place = draw(st.integers(0, value.shape[axis] - 1))
    number = draw(st.sampled_from([0.5, 1j, 1 - 2j]))
    listed = draw(st.booleans())

    def assign(x: Tensor) -> Tensor:
        y = x.clone()
        y[(*[slice(None)] * axis, torch.tensor([place]) if listed else place)] = number
        return y

    return assign


@drawn(COMPLEX)
def joined(draw: Draw, value: Tensor) -> Step:
    axis, stacks = dim(draw, value), draw(st.booleans())
    if stacks and value.ndim < 4:
        return lambda x: torch.stack([x, x.conj(), 1j * x], axis)
    return lambda x: torch.cat([x, x.real, -x], axis)


@drawn(COMPLEX)
def parted(draw: Draw, value: Tensor) -> Step:
    axis, count = dim(draw, value), draw(st.integers(1, 3))
    return lambda x: torch.cat([part * (1 + index * 1j) for index, part in enumerate(x.chunk(count, axis))][::-1], axis)


@drawn(COMPLEX)
def padded(draw: Draw, value: Tensor) -> Step:
    margins = draw(
        st.lists(st.integers(0, 2), min_size=2, max_size=2 * min(value.ndim, 2)).filter(lambda m: len(m) % 2 == 0)
    )
    border = draw(st.sampled_from([0, 0.5, 1 - 1j]))
    return lambda x: torch.constant_pad_nd(x, margins, border)


@drawn(COMPLEX)
def repeated(draw: Draw, value: Tensor) -> Step:
    axis, count = dim(draw, value), draw(st.integers(1, 3))
    return lambda x: x.repeat_interleave(count, axis).roll(1, axis).flip(axis)


@drawn(COMPLEX)
def multiplied(draw: Draw, value: Tensor) -> Step:
    if value.ndim < 2:
        return lambda x: torch.outer(x, x.conj())
    how = draw(st.integers(0, 3))
    if how == 0:
        return lambda x: x @ x.mH
    if how == 1:
        return lambda x: torch.einsum("...ij,...ik->...jk", x, x)
    if how == 2:
        return lambda x: torch.einsum("...ij,...ik,...k->...j", x, x.conj(), x[..., 0, :])
    return lambda x: nn.functional.linear(x, x.new_full((3, x.shape[-1]), 0.5 + 1j), x.new_full((3,), 1j))


@drawn(COMPLEX)
def masked(draw: Draw, value: Tensor) -> Step:
    number = draw(st.sampled_from([0.0, 1j, 1 - 2j]))
    how = draw(st.integers(0, 2))

    def mask(x: Tensor) -> Tensor:
        odd = torch.arange(x.shape[-1]) % 2 == 1
        if how == 0:
            return x.masked_fill(odd, number)
        return torch.where(odd, x, number) if how == 1 else x * odd

    return mask


@drawn(COMPLEX)
def reduced(draw: Draw, value: Tensor) -> Step:
    name = draw(st.sampled_from(["sum", "mean", "var", "std", "norm", "prod"]))
    axes, keeps = dims(draw, value), draw(st.booleans())
    if name == "prod":
        return lambda x: x.prod(axes[0], keepdim=keeps)
    if name == "norm":
        return lambda x: torch.linalg.vector_norm(x + 2, dim=axes, keepdim=keeps)
    if name in ("var", "std"):
        return lambda x: getattr(torch.cat([x + 1, x - 1j], axes[0]), name)(axes, keepdim=keeps)
    return lambda x: getattr(x, name)(axes, keepdim=keeps)


@drawn(COMPLEX)
def accumulated(draw: Draw, value: Tensor) -> Step:
    axis, product = dim(draw, value), draw(st.booleans())
    return lambda x: x.cumprod(axis) if product else x.cumsum(axis)


@drawn(COMPLEX)
def convolved(draw: Draw, value: Tensor) -> Step:
    transposed = draw(st.booleans())

    def convolve(x: Tensor) -> Tensor:
        kernel, bias = x.new_full((1, 1, 2), 0.5 - 1j), x.new_full((1,), 1j)
        function = nn.functional.conv_transpose1d if transposed else nn.functional.conv1d
        return function(x.reshape(-1, 1, x.shape[-1]), kernel, bias, 1, 0 if transposed else 1)

    return convolve


def at_most_one(value: Tensor) -> Tensor:
    return value / (1 + value.abs().amax())


@dataclasses.dataclass
class Composition:
    """A function, the tensor that it takes, and what it is made of."""

    function: Step
    value: Tensor
    names: list[str]


@st.composite
def compositions(draw: Draw, longest: int) -> Composition:
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 7)))
    dtype = torch.complex128 if draw(st.booleans()) else torch.float64
    start = torch.randn(shape, dtype=dtype, generator=generator)
    value, steps, names = start, [], []
    for _ in range(draw(st.integers(2, longest))):
        table = COMPLEX if value.is_complex() else REAL
        name = draw(st.sampled_from(sorted(table)))
        step = table[name](draw, value)
        value = at_most_one(step(value))
        steps.append(step)
        names.append(name)
        if value.ndim == 0 or value.ndim > 4 or value.numel() > LARGEST:
            break

    def function(x: Tensor) -> Tensor:
        for step in steps:
            x = at_most_one(step(x))
        return x

    return Composition(function, start, names)


class Module(nn.Module):
    def __init__(self, function: Step) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def check(case: Composition) -> None:
    note(" → ".join(case.names))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        expected = as_real(case.function(case.value))
    finally:
        torch.set_default_dtype(before)
    narrow = case.value.to(torch.complex64 if case.value.is_complex() else torch.float32)
    program = lower(capture(Module(case.function), (narrow,)))
    assert_real(program)
    with torch.no_grad():
        found = program.module()(as_real(narrow))
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < TOLERANCE


def as_real(value: Tensor) -> Tensor:
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


SETTINGS = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@given(compositions(longest=4))
@settings(max_examples=60, **SETTINGS)
def test_compositions(case: Composition) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(compositions(longest=8))
@settings(max_examples=800, **SETTINGS)
def test_many_compositions(case: Composition) -> None:
    check(case)
