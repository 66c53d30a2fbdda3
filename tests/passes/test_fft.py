import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from passes_checks import TOLERANCE, assert_real, operators
from torch import Tensor, nn

from mobilemix.capture import capture
from mobilemix.passes import lower
from mobilemix.passes.complex_to_real import ComplexToReal, costs, fft
from mobilemix.passes.complex_to_real.dft import Transform

EXACT = 1e-13
"""Relative L2 error of a float64 program."""

TIERS = {torch.float32: TOLERANCE, torch.float64: EXACT}
NORMS = (None, "backward", "ortho", "forward")
TO_COMPLEX = ("fft", "ifft", "rfft", "ihfft")
OF_COMPLEX = ("fft", "ifft", "irfft", "hfft")
RANK = 5
"""Core ML has no tensors of more axes."""

Function = Callable[[Tensor], Tensor]


class Functions(nn.Module):
    """Every function of the input, as real tensors."""

    def __init__(self, functions: list[Function]):
        super().__init__()
        self.functions = functions

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        results = [function(x) for function in self.functions]
        return tuple(torch.view_as_real(y.resolve_conj()) if y.is_complex() else y for y in results)


def check(functions: list[Function], x: Tensor) -> None:
    """The pass against eager in float64, one function at a time, in the tier of the input's dtype."""
    module = Functions(functions)
    result = ComplexToReal()(torch.export.export(module, (x,), strict=False).run_decompositions({}))
    assert result.modified
    assert_real(result.program)
    for node in result.program.graph.nodes:
        value = node.meta.get("val")
        assert not isinstance(value, Tensor) or value.dim() <= RANK
        assert not isinstance(value, Tensor) or value.dtype != torch.float64 or x.dtype == torch.float64
    for index, (found, expected) in enumerate(zip(result.program.module()(x), module(x.double()), strict=True)):
        assert found.shape == expected.shape, index
        assert found.dtype == x.dtype, index
        error = float((found - expected).norm() / expected.norm().clamp_min(1e-9))
        assert error < TIERS[x.dtype], (index, error)


def signal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.fixture
def shuffled(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Called with a seed, lets each transform take a form at random."""

    def shuffle(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def below(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        def best(transform: Transform, outer: int, inner: int) -> costs.Form:
            forms = list(costs.mixed(transform, outer, inner)) if below(4) else []
            forms = forms or list(costs.dense_forms(transform.inputs, transform.outputs, outer, inner))
            return forms[below(len(forms))]

        def is_joint(_shape: Any, axes: list[int], _transforms: Any) -> bool:
            return len(axes) > 1 and max(axes) - min(axes) < len(axes) and not below(3)

        monkeypatch.setattr(fft.costs, "best", best)
        monkeypatch.setattr(fft, "_is_joint", is_joint)

    return shuffle


@pytest.fixture(params=TIERS, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param  # type: ignore[no-any-return]


def one(name: str, n: int | None, dim: int, norm: str | None, of_complex: bool) -> Function:
    function = getattr(torch.fft, name)
    return lambda x: function(torch.view_as_complex(x) if of_complex else x, n=n, dim=dim, norm=norm)


OF_EITHER = [(name, of_complex) for name in ("fft", "ifft", "irfft", "hfft") for of_complex in (False, True)]


@pytest.mark.parametrize(("name", "of_complex"), [*OF_EITHER, ("rfft", False), ("ihfft", False)])
def test_one_axis(name: str, of_complex: bool, dtype: torch.dtype, shuffled: Callable[[int], None]) -> None:
    """Cut and padded, odd, even and prime, along the first, a middle and the last axis."""
    lengths = (None, 1, 2, 7, 8, 12, 15)
    norms = itertools.cycle(NORMS)
    shuffled(len(name) + of_complex)
    functions = [one(name, n, dim, next(norms), of_complex) for n in lengths for dim in (0, 1, -1)]
    check(functions, signal(6, 9, 8, 2, dtype=dtype) if of_complex else signal(6, 9, 8, dtype=dtype))


@pytest.mark.parametrize("name", ["fft", "ifft", "rfft", "irfft", "hfft", "ihfft"])
def test_several_axes(name: str, dtype: torch.dtype, shuffled: Callable[[int], None]) -> None:
    shuffled(len(name))
    two, many = getattr(torch.fft, f"{name}2"), getattr(torch.fft, f"{name}n")
    functions: list[Function] = [lambda x, norm=norm: two(x, norm=norm) for norm in NORMS]
    functions += [
        lambda x: two(x, s=(8, 9), dim=(1, 0)),
        lambda x: two(x, s=(-1, 6), norm="ortho"),
        lambda x: many(x, dim=(0, 2)),
        lambda x: many(x, dim=(2, 0, 1), norm="forward"),
        lambda x: many(x, s=(8, 3)),
        lambda x: many(x, norm="ortho"),
    ]
    check(functions, signal(6, 4, 10, dtype=dtype))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_there_and_back(dtype: torch.dtype, seed: int | None, shuffled: Callable[[int], None]) -> None:
    """In the forms that cost least, and in others."""
    if seed is not None:
        shuffled(seed)

    def filtered(x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, norm="ortho")
        return torch.fft.irfft2(spectrum * torch.arange(spectrum.shape[-1]), s=x.shape[-2:], norm="ortho")

    def volume(x: Tensor) -> Tensor:
        return torch.fft.irfftn(torch.fft.rfftn(x), s=x.shape)

    def half_of_real(x: Tensor) -> Tensor:
        return torch.fft.fft2(x).real + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real

    def one_part(x: Tensor) -> Tensor:
        return torch.fft.rfft(x).real + torch.fft.ihfft(x).imag

    def convolution(x: Tensor) -> Tensor:
        length = x.shape[-1]
        spectrum = torch.fft.rfft(x, n=2 * length)
        return torch.fft.irfft(spectrum * spectrum.conj(), n=2 * length)[..., :length]

    check([filtered, volume, half_of_real, one_part, convolution], signal(6, 8, 12, dtype=dtype))


def test_shifts_and_frequencies(dtype: torch.dtype) -> None:
    def shifted(x: Tensor) -> Tensor:
        return torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1))

    def unshifted(x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.ifftshift(torch.fft.fftshift(torch.fft.fft(x)), dim=-1)).real

    def derivative(x: Tensor) -> Tensor:
        frequencies = torch.fft.fftfreq(x.shape[-1], d=0.5, dtype=x.dtype)
        return torch.fft.ifft(2j * torch.pi * frequencies * torch.fft.fft(x)).real

    def smoothed(x: Tensor) -> Tensor:
        frequencies = torch.fft.rfftfreq(x.shape[-1], d=2.0, dtype=x.dtype)
        return torch.fft.irfft(torch.fft.rfft(x) / (1 + frequencies**2), n=x.shape[-1])

    check([shifted, unshifted, derivative, smoothed], signal(3, 7, 10, dtype=dtype))
    check([lambda x: torch.fft.ifftshift(x, dim=0) + torch.fft.fft(torch.fft.fftshift(x)).real], signal(5, 4))


@pytest.mark.parametrize("length", [1000, 1024, 2187, 4096])
def test_long_transforms(length: int) -> None:
    def there_and_back(x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * 0.5, n=length)

    functions = [there_and_back, torch.fft.fft, lambda x: torch.fft.ifft(torch.fft.fft(x)).real]
    x = signal(3, length)
    check(functions, x)
    program = lower(capture(Functions(functions), (x,)))
    largest = max(tensor.numel() for tensor in program.state_dict.values())
    assert largest < length**2 / 8, "a dense matrix has the square of the length"
    assert not {"view", "einsum"} & set(operators(program))


def test_layers_share_their_matrices() -> None:
    def layers(count: int) -> int:
        def function(x: Tensor) -> Tensor:
            for _ in range(count):
                x = torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho").abs() + 0j, s=(64, 64), norm="ortho")
                x = x + torch.fft.irfft(torch.fft.rfft(x.flatten(2)) * 0.5, n=4096).reshape(x.shape)
            return x

        return len(lower(capture(Functions([function]), (signal(1, 16, 64, 64),))).state_dict)

    assert layers(1) == layers(3)


def test_small_maps_are_one_product() -> None:
    functions = [lambda x: torch.fft.irfft2(torch.fft.rfft2(x).abs() + 0j, s=x.shape[-2:])]
    assert operators(ComplexToReal()(capture(Functions(functions), (signal(256, 6, 6),))).program)["mm"] == 2
    check(functions, signal(256, 6, 6))


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[Function], tuple[int, ...]]:
    """Transforms there, and of what they give a transform back, with whichever arguments."""
    shape = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple))
    functions: list[Function] = []
    for _ in range(3):
        norm, back_norm = draw(st.sampled_from(NORMS)), draw(st.sampled_from(NORMS))
        there, back = draw(st.sampled_from(TO_COMPLEX)), draw(st.sampled_from(OF_COMPLEX))
        axes = tuple(draw(st.permutations(range(len(shape))))[: draw(st.integers(1, min(3, len(shape))))])
        sizes = draw(st.none() | st.tuples(*[st.integers(1, 20) for _ in axes]))
        lengths = draw(st.tuples(*[st.integers(2, 20) for _ in axes]))

        first = functools.partial(getattr(torch.fft, f"{there}n"), s=sizes, dim=axes, norm=norm)
        second = functools.partial(getattr(torch.fft, f"{back}n"), s=lengths, dim=axes, norm=back_norm)
        functions.append(lambda x, first=first, second=second: second(first(x)))
    return functions, shape


ANY_FORM = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@given(case=chains(), seed=st.integers(0, 10**6), dtype=st.sampled_from(sorted(TIERS, key=str)))
@settings(max_examples=10, **ANY_FORM)
def test_any_transform_in_any_form(shuffled: Any, case: Any, seed: int, dtype: torch.dtype) -> None:
    shuffled(seed)
    functions, shape = case
    check(functions, signal(*shape, dtype=dtype))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@given(case=chains(), seed=st.integers(0, 10**6), dtype=st.sampled_from(sorted(TIERS, key=str)))
@settings(max_examples=250, **ANY_FORM)
def test_many_transforms_in_any_form(shuffled: Any, case: Any, seed: int, dtype: torch.dtype) -> None:
    shuffled(seed)
    functions, shape = case
    check(functions, signal(*shape, dtype=dtype))
