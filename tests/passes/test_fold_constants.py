import pytest
import torch
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten
from torch import Tensor, nn

from mobilemix.passes import fold_constants
from mobilemix.passes.fold_constants import FoldConstants


class Weighted(nn.Module):
    """A chain of operators on weights, and a grid made of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 3, 4))
        self.spectrum = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.w.softmax(-1).unbind(0)
        kernel = torch.fft.ifft(self.spectrum * torch.fft.fft(second)).real
        grid = torch.linspace(0, 1, 3)[:, None] * torch.arange(4)
        return x * first + kernel + grid


def test_only_what_depends_on_the_input_is_left() -> None:
    module, x = Weighted(), torch.randn(2, 3, 4)
    program = rewritten(FoldConstants(), module, x)
    assert operators(program) == {"mul": 1, "add": 2}
    assert relative_error(program, module, x) < TOLERANCE
    assert not any(value.is_complex() for value in program.state_dict.values())
    assert set(program.state_dict) == {"w_item", "spectrum_real", "linspace_mul"}


def test_a_chain_is_rounded_once() -> None:
    class Cancelling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0]))

        def forward(self, x: Tensor) -> Tensor:
            return x * ((self.w + 1e-9) - 1) * 1e9

    program = rewritten(FoldConstants(), Cancelling(), torch.ones(1))
    assert program.module()(torch.ones(1)).item() == pytest.approx(1, abs=1e-6), "0 in float32"


class Growing(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.size, self.w = size, nn.Parameter(torch.randn(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.expand(self.size, 8)


def test_small_constants_may_grow_and_large_ones_do_not() -> None:
    small = fold_constants._MAY_GROW_TO // 8
    assert operators(rewritten(FoldConstants(), Growing(small), torch.randn(1, small))) == {"matmul": 1}
    assert_untouched(FoldConstants(), Growing(small + 1), torch.randn(1, small + 1))


class Implicit(nn.Module):
    """A filter that a small network makes of time, as large as its input, and its spectrum."""

    def __init__(self, channels: int, length: int) -> None:
        super().__init__()
        self.length, self.w = length, nn.Parameter(torch.randn(1, channels))

    def forward(self, x: Tensor) -> Tensor:
        kernel = torch.sin(torch.linspace(0, 1, self.length)[:, None] * self.w).T
        return torch.fft.irfft(torch.fft.rfft(kernel, 2 * self.length) * torch.fft.rfft(x, 2 * self.length))


def test_spectra_of_constants_are_folded_at_any_size() -> None:
    channels, length = 8, fold_constants._MAY_GROW_TO // 4
    module, x = Implicit(channels, length), torch.randn(channels, length)
    program = rewritten(FoldConstants(), module, x)
    assert operators(program) == {"fft_rfft": 1, "mul": 1, "fft_irfft": 1}
    assert relative_error(program, module, x) < TOLERANCE


def test_a_program_without_constant_expressions_is_left_alone() -> None:
    assert_untouched(FoldConstants(), nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(2, 3))
