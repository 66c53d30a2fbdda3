import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilemix.passes.complex_to_real import dft

EXACT = 1e-13
LENGTHS = st.integers(1, 97)


def _stack(spectrum: torch.Tensor) -> torch.Tensor:
    return torch.cat((spectrum.real, spectrum.imag))


@given(signal=LENGTHS, n=LENGTHS, seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_matrices_are_the_transforms_of_torch(signal: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(signal, dtype=torch.float64, generator=generator)
    z = torch.complex(x, torch.randn(signal, dtype=torch.float64, generator=generator))
    pairs = (
        (dft.real_to_complex(signal, n, n // 2 + 1, -1, 1.0) @ x, _stack(torch.fft.rfft(x, n))),
        (dft.real_to_complex(signal, n, n, -1, n**-0.5) @ x, _stack(torch.fft.fft(x, n, norm="ortho"))),
        (dft.real_to_complex(signal, n, n // 2 + 1, 1, 1 / n) @ x, _stack(torch.fft.ihfft(x, n))),
        (dft.complex_to_complex(signal, n, -1, 1.0) @ _stack(z), _stack(torch.fft.fft(z, n))),
        (dft.complex_to_complex(signal, n, 1, 1 / n) @ _stack(z), _stack(torch.fft.ifft(z, n))),
        (dft.complex_to_real(signal, n, 1, 1 / n) @ _stack(z), torch.fft.irfft(z, n)),
        (dft.complex_to_real(signal, n, -1, 1.0) @ _stack(z), torch.fft.hfft(z, n)),
    )
    for found, expected in pairs:
        assert (found - expected).norm() <= EXACT * max(1.0, float(expected.norm()))


def test_large_lengths_stay_exact() -> None:
    """Angles of unreduced products k·j would be off by 1e-10 here."""
    n = 4096
    re, im = dft.complex_matrix(n, n, n, -1, 1.0)
    last = torch.exp(torch.tensor(-2j * torch.pi * ((n - 1) * (n - 1) % n) / n, dtype=torch.complex128))
    assert abs(re[-1, -1] - last.real) < EXACT
    assert abs(im[-1, -1] - last.imag) < EXACT
    assert im[n // 2].abs().max() == 0
    assert re[n // 4, 1::2].abs().max() == 0


@pytest.mark.parametrize("axis", [0, 1])
def test_interleaving_alternates_the_parts(axis: int) -> None:
    matrix = torch.arange(24.0).reshape(4, 6)
    order = [0, 2, 1, 3] if axis == 0 else [0, 3, 1, 4, 2, 5]
    assert torch.equal(dft.interleaved(matrix, axis), matrix.index_select(axis, torch.tensor(order)))
