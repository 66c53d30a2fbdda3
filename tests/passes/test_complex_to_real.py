from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import TOLERANCE, assert_real, assert_untouched, operators, relative_error, rewritten
from torch import Tensor, nn

from mobilemix.capture import capture
from mobilemix.errors import CaptureError, UnsupportedOpError
from mobilemix.passes import lower
from mobilemix.passes.complex_to_real import ComplexToReal, dft
from mobilemix.passes.complex_to_real.table import RULES


class Function(nn.Module):
    """A function of the input and of a complex parameter, as a module."""

    def __init__(self, function: Callable[..., Any], *shape: int):
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.complex64, generator=generator)) if shape else None

    def forward(self, x: Tensor) -> Any:
        return self.function(x) if self.weight is None else self.function(x, self.weight)


def check(function: Callable[..., Any], x: Tensor, *weight: int) -> None:
    module = Function(function, *weight)
    program = rewritten(ComplexToReal(), module, x)
    assert_real(program)
    assert relative_error(program, module, x) < TOLERANCE


def signal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


NORMS = st.sampled_from([None, "backward", "ortho", "forward"])
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@st.composite
def transforms(draw: st.DrawFn) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    """A transform there and, of what it gives, one that torch accepts, with whichever arguments."""
    shape = draw(SHAPES)
    axis = draw(st.integers(-len(shape), len(shape) - 1))
    n = draw(st.none() | st.integers(1, 12))
    norm = draw(NORMS)
    there = draw(st.sampled_from(["fft", "ifft", "rfft", "ihfft"]))
    back = draw(st.sampled_from(["fft", "ifft", "irfft", "hfft"]))
    length = draw(st.integers(2, 12))

    def run(x: Tensor) -> Tensor:
        z = getattr(torch.fft, there)(x, n=n, dim=axis, norm=norm)
        y = getattr(torch.fft, back)(z, n=length, dim=axis, norm=norm)
        return torch.view_as_real(y) if y.is_complex() else y

    return run, shape


@given(transforms())
@settings(max_examples=30, deadline=None)
def test_transforms_of_one_axis(case: tuple[Callable[[Tensor], Tensor], tuple[int, ...]]) -> None:
    function, shape = case
    check(function, signal(*shape))


@st.composite
def transforms_of_axes(draw: st.DrawFn) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...]]:
    shape = draw(st.lists(st.integers(2, 7), min_size=2, max_size=4).map(tuple))
    axes = draw(st.permutations(range(len(shape))))[: draw(st.integers(1, len(shape)))]
    axes = draw(st.none() | st.just(tuple(axes)))
    sizes = draw(st.none() | st.just(tuple(draw(st.integers(2, 9)) for _ in (axes or shape))))
    norm = draw(NORMS)
    there, back = draw(
        st.sampled_from([("fftn", "ifftn"), ("rfftn", "irfftn"), ("ifftn", "hfftn"), ("ihfftn", "hfftn")])
    )

    def run(x: Tensor) -> Tensor:
        z = getattr(torch.fft, there)(x, s=sizes, dim=axes, norm=norm)
        y = getattr(torch.fft, back)(z, s=tuple(x.shape[a] for a in axes) if axes else x.shape, dim=axes, norm=norm)
        return torch.view_as_real(y) if y.is_complex() else y

    return run, shape


@given(transforms_of_axes())
@settings(max_examples=25, deadline=None)
def test_transforms_of_several_axes(case: tuple[Callable[[Tensor], Tensor], tuple[int, ...]]) -> None:
    function, shape = case
    check(function, signal(*shape))


def test_two_dimensional_transforms_need_two_products_each_way() -> None:
    module = Function(lambda x, k: torch.fft.irfft2(torch.fft.rfft2(x) * k, s=x.shape[-2:]), 32, 14, 10)
    x = signal(8, 32, 14, 18)
    program = rewritten(ComplexToReal(), module, x)
    found = operators(program)
    assert found["mm"] + found["matmul"] == 4
    assert found["cat"] == 1, "the parts are put together once, before the way back"
    assert relative_error(program, module, x) < TOLERANCE


def test_an_imaginary_part_that_nobody_uses_is_not_computed() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.fft.fft2(x).real, torch.fft.ifft2(torch.fft.rfft2(x), s=(6, 8)).real

    module, x = Function(function), signal(3, 6, 8)
    program = rewritten(ComplexToReal(), module, x)
    assert "slice" not in operators(program)
    assert relative_error(program, module, x) < TOLERANCE


def test_equal_matrices_are_stored_once() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.fft.irfft2(torch.fft.rfft2(x).abs() + 0j, s=(14, 14))
        return x

    program = rewritten(ComplexToReal(), Function(function), signal(256, 14, 14))
    assert len([name for name in program.state_dict if name.startswith("dft")]) == 4


SPECTRA: dict[str, Callable[..., Tensor]] = {
    "binary mask": lambda z: z * (z.abs() > 1) + z * torch.arange(z.shape[-1]),
    "scale": lambda z: 2.5 * z / 3,
    "imaginary scale": lambda z: 1j * z * (2 - 1j),
    "shift": lambda z: z + 1 - 2j,
    "reverse": lambda z: 1 - z,
    "alpha": lambda z: torch.add(z, z.conj(), alpha=2) - torch.sub(z, z.real, alpha=3),
    "product": lambda z: z * z.conj() + z * z.real,
    "quotient": lambda z: z / (z + 3) + 1 / (z + 3) + z.real / (z.imag * 1j + 2),
    "polar": lambda z: torch.polar(z.abs(), z.angle()),
    "exponential": lambda z: torch.exp(0.1 * z),
    "square": lambda z: z.square() + z.reciprocal(),
    "powers": lambda z: z**3 + (z + 4) ** 0.5 + (z + 4).sqrt(),
    "logarithm": lambda z: torch.log(z + 4),
    "filled": lambda z: z.masked_fill(z.abs() < 1, 1 - 2j),
    "equality": lambda z: (z == z[:, :1]).float() + (z != z[:, :1]).float(),
    "norm": lambda z: torch.linalg.vector_norm(z, dim=(2, 3)),
    "dot": lambda z: torch.vdot(z.flatten(), z.flatten() * 1j).reshape(1),
    "strides": lambda z: torch.tensordot(z, z.mean((0, 3)), dims=([1], [0])),
    "negative": lambda z: -z,
    "mask": lambda z: torch.where(z.abs() > 1, z, torch.zeros_like(z)),
    "real branch": lambda z: torch.where(z.abs() > 1, z, z.real),
    "matmul": lambda z: z @ z.transpose(-1, -2),
    "adjoint": lambda z: z @ z.mH,
    "einsum": lambda z: torch.einsum("bchw,bdhw->bcd", z, z.conj()),
    "cat": lambda z: torch.cat([z, z.real, z.conj()], 1),
    "stack": lambda z: torch.stack([z, 2 * z], 1).mean(1),
    "chunk": lambda z: torch.cat(z.chunk(2, dim=1)[::-1], dim=1),
    "split": lambda z: z.split([1, 3], dim=1)[1],
    "slice": lambda z: z[:, 1:, ::2, -2:],
    "select": lambda z: z[:, 0].unsqueeze(1),
    "index": lambda z: z[:, torch.tensor([2, 0])].index_select(2, torch.tensor([1, 1])),
    "reshape": lambda z: z.reshape(z.shape[0], -1).view(*z.shape).flatten(1, 2).unflatten(1, z.shape[1:3]),
    "permute": lambda z: z.permute(0, 2, 3, 1).movedim(1, 2).transpose(0, 1).contiguous(),
    "expand": lambda z: z[:, :1].expand(-1, 3, -1, -1).repeat(1, 2, 1, 1),
    "roll": lambda z: torch.roll(z, (1, -2), (2, 3)).flip(1),
    "shifted": lambda z: torch.fft.ifftshift(torch.fft.fftshift(z, dim=(2, 3)) * 2, dim=(2, 3)),
    "pad": lambda z: torch.nn.functional.pad(z, (1, 2, 0, 1)),
    "mean": lambda z: z.mean((2, 3)) + z.sum((2, 3)),
    "view": lambda z: torch.view_as_complex(torch.view_as_real(z) * 0.5),
    "both parts": lambda z: torch.complex(z.imag, z.real),
    "softshrink": lambda z: torch.view_as_complex(torch.nn.functional.softshrink(torch.view_as_real(z), 0.1)),
    "constants": lambda z: z + torch.zeros(z.shape, dtype=z.dtype) + torch.full((1,), 2j) + torch.ones_like(z),
    "cast": lambda z: z + z.real.to(z.dtype),
    "frequencies": lambda z: z * torch.fft.fftfreq(z.shape[-2])[:, None] + torch.fft.rfftfreq(2 * z.shape[-1] - 1),
    "normalised": lambda z: z / z.abs().clamp_min(1e-3),
}


@pytest.mark.parametrize("name", SPECTRA)
def test_operators_between_transforms(name: str) -> None:
    def function(x: Tensor) -> Tensor:
        y = SPECTRA[name](torch.fft.rfft2(x, norm="ortho"))
        return torch.view_as_real(y) if y.is_complex() else y

    check(function, signal(2, 4, 6, 6))


@given(
    n=st.integers(4, 16),
    hop=st.integers(1, 4),
    window=st.none() | st.integers(3, 16),
    center=st.booleans(),
    normalized=st.booleans(),
    onesided=st.booleans(),
    batch=st.sampled_from([(), (3,)]),
)
@settings(max_examples=20, deadline=None)
@pytest.mark.filterwarnings("ignore:A window was not provided")
def test_short_time_transforms(
    n: int, hop: int, window: int | None, center: bool, normalized: bool, onesided: bool, batch: tuple[int, ...]
) -> None:
    width = None if window is None else min(window, n)

    def function(x: Tensor) -> Tensor:
        taper = None if width is None else torch.linspace(0.5, 1.5, width, dtype=x.dtype)
        options = {"hop_length": hop, "win_length": width, "window": taper, "center": center, "normalized": normalized}
        z = torch.stft(x, n, onesided=onesided, return_complex=True, **options)
        return torch.view_as_real(z)

    check(function, signal(*batch, 40))


@pytest.mark.parametrize("length", [None, 30, 45])
@pytest.mark.parametrize("normalized", [False, True])
def test_short_time_transforms_and_back(length: int | None, normalized: bool) -> None:
    def function(x: Tensor) -> Tensor:
        options = {"hop_length": 3, "window": torch.hann_window(12, dtype=x.dtype), "normalized": normalized}
        z = torch.stft(x, 12, return_complex=True, **options)
        return torch.istft(z * z.abs(), 12, length=length, **options)

    check(function, signal(2, 40))


WEIGHTED: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "product": (lambda z, k: z * k, (4, 6, 4)),
    "matmul": (lambda z, k: z @ k, (4, 3)),
    "linear": (lambda z, k: torch.nn.functional.linear(z, k), (3, 4)),
    "convolution": (lambda z, k: torch.nn.functional.conv2d(z, k, bias=k[:, 0, 0, 0], padding=1), (3, 4, 2, 2)),
    "modes": (lambda z, k: torch.einsum("bixy,ioxy->boxy", z, k), (4, 3, 6, 4)),
    "blocks": (lambda z, k: torch.einsum("bgixy,gio->bgoxy", z.unflatten(1, (2, 2)), k), (2, 2, 3)),
    "three factors": (lambda z, k: torch.einsum("bixy,io,oy->boxy", z, k[:, :3], k[:3]), (4, 4)),
    "transformed": (lambda z, k: z * torch.fft.fft(k)[..., :4], (4, 6, 5)),
}


@pytest.mark.parametrize("name", WEIGHTED)
def test_complex_parameters(name: str) -> None:
    function, shape = WEIGHTED[name]
    check(lambda x, k: torch.view_as_real(function(torch.fft.rfft2(x, norm="ortho"), k)), signal(2, 4, 6, 6), *shape)


def test_parameters_become_their_parts() -> None:
    program = rewritten(ComplexToReal(), Function(lambda x, k: (x * k).abs(), 3), signal(2, 3))
    assert set(program.state_dict) == {"weight_re", "weight_im"}


def test_metadata_names_the_source() -> None:
    program = rewritten(ComplexToReal(), Function(lambda x: torch.fft.fft(x).abs()), signal(2, 4))
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    assert all(__file__ in node.meta["stack_trace"] and node.meta["nn_module_stack"] for node in calls)


def test_real_operators_stay_as_they_are() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.linear = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.nn.functional.gelu(self.linear(self.norm(x)))
            x = torch.nn.functional.scaled_dot_product_attention(x, x, x)
            return torch.fft.fft(x).real

    found = operators(rewritten(ComplexToReal(), Module(), signal(2, 3, 8)))
    assert all(found[name] == 1 for name in ("layer_norm", "linear", "gelu", "scaled_dot_product_attention"))


def test_a_real_program_is_left_alone() -> None:
    assert_untouched(ComplexToReal(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()), signal(1, 3, 8, 8))


def test_an_operator_without_a_rule_is_named_with_its_place() -> None:
    program = capture(Function(lambda x: torch.linalg.svdvals(torch.fft.fft(x))), (signal(4, 4),))
    with pytest.raises(
        UnsupportedOpError, match=r"aten\.\w*svd\S* on complex tensors at .*test_complex_to_real\.py:\d+"
    ):
        ComplexToReal()(program)


def test_what_depends_on_values_is_refused_with_its_place() -> None:
    def counted(x: Tensor) -> Tensor:
        return torch.fft.rfft(x, n=int((x > 0).sum())).abs()

    with pytest.raises(CaptureError, match=r"test_complex_to_real\.py:\d+ \(return torch\.fft\.rfft"):
        capture(Function(counted), (signal(4),))
    program = capture(Function(lambda x: torch.fft.fft(x).abs()[x > 0]), (signal(4),))
    with pytest.raises(UnsupportedOpError, match=r"dynamic shapes \(u0, aten\.\S+ at .*test_complex_to_real\.py:\d+"):
        lower(program)


@pytest.mark.parametrize("name", ["det", "inv", "eigvals", "qr"])
def test_refusals_say_what_to_change(name: str) -> None:
    program = capture(Function(getattr(torch.linalg, name)), (torch.view_as_complex(signal(3, 3, 2)),))
    with pytest.raises(UnsupportedOpError) as refusal:
        lower(program)
    message = str(refusal.value)
    assert "\n" not in message
    assert name in message
    assert "compute what it does from the real and the imaginary part" in message
    assert f"{__file__}:" in message


def test_complex_inputs_and_outputs_become_real_with_a_last_axis_of_parts() -> None:
    def function(z: Tensor) -> tuple[Tensor, ...]:
        y = torch.fft.fft2(z)
        return y, z, y.abs(), y.mH @ y, y

    module, z = Function(function), torch.view_as_complex(signal(3, 4, 4, 2))
    program = rewritten(ComplexToReal(), module, z)
    assert_real(program)
    assert [tuple(value.shape) for value in program.example_inputs[0]] == [(3, 4, 4, 2)]
    with torch.no_grad():
        expected = [torch.view_as_real(value) if value.is_complex() else value for value in function(z)]
        found = program.module()(torch.view_as_real(z))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_transform_takes_a_complex_input_as_it_is() -> None:
    program = rewritten(ComplexToReal(), Function(torch.fft.irfft), torch.view_as_complex(signal(3, 8, 2)))
    assert not {"select", "slice", "cat"} & set(operators(program))


def test_complex_inputs_that_nobody_reads_and_outputs_that_are_parameters() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([1 + 2j]))

        def forward(self, z: Tensor, unused: Tensor) -> tuple[Tensor, Tensor]:
            return self.weight, 2 * z.real

    pairs = signal(3, 2)
    program = rewritten(ComplexToReal(), Module(), torch.view_as_complex(pairs), torch.zeros(1, dtype=torch.complex64))
    weight, doubled = program.module()(pairs, torch.zeros(1, 2))
    assert weight.tolist() == [[1, 2]]
    assert torch.equal(doubled, 2 * pairs[:, 0])


def test_every_rule_is_an_operator_of_torch() -> None:
    assert [name for name in RULES if not hasattr(torch.ops.aten, name.removeprefix("aten::"))] == []


def test_unweighted_half_spectra_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dft.complex_to_real
    monkeypatch.setattr(dft, "complex_to_real", lambda *args: right(*args) * 0.5)
    module, x = Function(lambda x: torch.fft.irfft(torch.fft.rfft(x))), signal(2, 8)
    assert relative_error(rewritten(ComplexToReal(), module, x), module, x) > 10 * TOLERANCE
