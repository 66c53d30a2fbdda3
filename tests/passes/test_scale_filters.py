from collections.abc import Callable

import pytest
import torch
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten
from torch import Tensor, nn
from zoo_fourier import LongConvolution

from mobilemix.capture import capture
from mobilemix.passes import PASSES, lower
from mobilemix.passes.scale_filters import ScaleFilters

fft = torch.fft

LENGTH = 4096
LARGEST_FP16 = 65504.0


class Filtered(nn.Module):
    def __init__(self, inverse: Callable[[Tensor], Tensor], *, first: bool = False) -> None:
        super().__init__()
        self.inverse, self.first = inverse, first
        self.k = nn.Parameter(torch.randn(4, 5, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        z = fft.fft(x, n=5)
        return self.inverse(self.k * z if self.first else z * self.k)


INVERSES = {
    "last axis": lambda z: fft.ifft(z).real,
    "another axis and length": lambda z: fft.irfft(z, n=9, dim=1),
    "two axes": lambda z: fft.irfft2(z, norm="backward"),
    "two axes and sizes": lambda z: fft.irfft2(z, s=(3, 7)),
    "sizes without axes": lambda z: fft.irfftn(z, s=(3, 7)),
    "all axes": lambda z: fft.ifftn(z).real,
    "given axes": lambda z: fft.ifftn(z, dim=(0, 2)).imag,
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", INVERSES)
def test_the_scale_goes_into_the_filter(name: str, first: bool) -> None:
    module, x = Filtered(INVERSES[name], first=first), torch.randn(3, 4, 6)
    program = rewritten(ScaleFilters(), module, x)
    assert relative_error(program, module, x) < TOLERANCE
    assert program.state_dict.keys() == {"k_scaled"}
    assert operators(program) == operators(capture(module, (x,)))


@pytest.mark.parametrize(
    "inverse",
    [
        lambda z: fft.irfft(z, norm="ortho"),
        lambda z: fft.irfft(z, norm="forward"),
        lambda z: fft.irfft(z.exp()),
        lambda z: fft.irfft(z).sum() + z.real,
        lambda z: fft.irfft(z * z),
    ],
)
def test_what_has_its_balance_or_no_filter_stays(inverse: Callable[[Tensor], Tensor]) -> None:
    assert_untouched(ScaleFilters(), Filtered(inverse), torch.randn(3, 4, 6))


def test_a_long_convolution_stays_within_float16() -> None:
    module, x = LongConvolution(2, LENGTH), torch.ones(1, 2, LENGTH) * 8
    module.kernel.data.fill_(1 / 16)
    program, peaks = capture(module, (x,)), []
    without = [step for step in PASSES if not isinstance(step, ScaleFilters)]
    for passes in (without, PASSES):
        interpreter = Peak(lower(program, passes).module())
        interpreter.run(x)
        peaks.append(interpreter.peak)
    assert peaks[0] > LARGEST_FP16 > peaks[1]


class Peak(torch.fx.Interpreter):
    """The largest magnitude of any value."""

    peak = 0.0

    def run_node(self, n: torch.fx.Node) -> object:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.peak = max(self.peak, float(value.detach().abs().max()))
        return value
