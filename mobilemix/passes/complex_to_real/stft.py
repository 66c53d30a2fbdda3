"""Rules of torch.stft and torch.istft: convolutions with the windowed rows of a Fourier matrix."""

import math
from typing import Any

import torch
from torch import Tensor

from mobilemix.passes.complex_to_real import dft
from mobilemix.passes.complex_to_real.fft import FORWARD, INVERSE, constant, stacked
from mobilemix.passes.complex_to_real.rules import pairs
from mobilemix.passes.complex_to_real.table import Call, rule
from mobilemix.passes.complex_to_real.values import Complex, Real, emit

aten = torch.ops.aten


@rule("stft")
def _(
    call: Call,
    x: Real | Complex,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Real | None = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,  # noqa: ARG001 -- the result's dtype says it
    align_to_window: bool | None = None,
) -> Any:
    """(B, L) → conv1d with (2·bins, parts, n_fft) → (B, bins, frames); padding comes before, on its own."""
    if isinstance(window, Complex) or align_to_window:
        return NotImplemented
    *batch, length = x.shape
    scale = n_fft**-0.5 if normalized else 1.0
    if isinstance(x, Complex):
        bins = n_fft
        rows = dft.complex_to_complex(n_fft, n_fft, FORWARD, scale)
        signal = stacked(x, len(batch)).reshape((math.prod(batch), 2, length))
    else:
        bins = n_fft if onesided is False else n_fft // 2 + 1
        rows = dft.real_to_complex(n_fft, n_fft, bins, FORWARD, scale)
        signal = x.reshape((math.prod(batch), 1, length))
    kernel = _windowed(call, rows, n_fft, window, win_length, call.dtype)
    frames = signal.call(aten.conv1d.default, kernel, None, [hop_length or n_fft // 4])
    spectrum = Complex.from_stacked(frames, (*batch, bins, frames.shape[-1]), len(batch))
    return spectrum if call.value.is_complex() else pairs(spectrum)


@rule("istft")
def _(
    call: Call,
    x: Complex,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: Real | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,  # noqa: ARG001 -- of a full spectrum, too, torch takes the first half
    length: int | None = None,
    return_complex: bool = False,
) -> Any:
    """(B, bins, frames) → conv_transpose1d with (2·bins, parts, n_fft), over the sum of squared windows → (B, L)."""
    *batch, bins, frames = x.shape
    if isinstance(window, Complex):
        return NotImplemented
    hop = [hop_length or n_fft // 4]
    scale = n_fft**-0.5 if normalized else 1 / n_fft
    make = dft.complex_to_complex if return_complex else dft.complex_to_real
    kernel = _windowed(call, make(bins, n_fft, INVERSE, scale).T, n_fft, window, win_length, call.dtype)
    weight = _windowed(call, torch.ones(1, n_fft), n_fft, window, win_length, call.dtype)
    parts = stacked(x, len(batch)).reshape((math.prod(batch), 2 * bins, frames))
    once = emit(call.edit, aten.full.default, [1, 1, frames], 1.0, dtype=call.dtype)
    signal = parts.call(aten.conv_transpose1d.default, kernel, None, hop)
    overlap = once.call(aten.conv_transpose1d.default, weight * weight, None, hop)
    available = signal.shape[-1]
    start = n_fft // 2 if center else 0
    stop = available - start if length is None else start + length
    inside = min(stop, available)
    result = signal.take(2, start, inside) / overlap.take(2, start, inside)
    if stop > available:
        result = result.call(aten.constant_pad_nd.default, [0, stop - available], 0.0)
    shape = (*batch, stop - start)
    return Complex.from_stacked(result, shape, len(batch)) if return_complex else result.reshape(shape)


def _windowed(
    call: Call, rows: Tensor, n_fft: int, window: Real | None, win_length: int | None, dtype: torch.dtype
) -> Real:
    """Kernels (rows, parts, n_fft) times the window, which is centred in n_fft; all ones where there is none."""
    count = len(rows)
    length = win_length or n_fft
    before = (n_fft - length) // 2
    margins = [before, n_fft - length - before]
    if window is None:
        rows = rows.reshape(count, -1, n_fft) * torch.nn.functional.pad(torch.ones(length), margins)
    kernel = constant(call, f"dft_{count}x{n_fft}", rows, dtype).reshape((count, -1, n_fft))
    return kernel if window is None else kernel * window.call(aten.constant_pad_nd.default, margins, 0.0)
