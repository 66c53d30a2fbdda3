"""Rules of torch.stft and torch.istft: convolutions with the windowed rows of a Fourier matrix."""

import math
from typing import Any

import torch
from torch import Tensor

from mobilemix.passes.complex_to_real import dft
from mobilemix.passes.complex_to_real.fft import FORWARD, INVERSE, along, constant
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
    *_options: Any,
    **_named_options: Any,
) -> Any:
    """(B, L) → conv1d with (2·bins, 1, n_fft) → (B, bins, frames). Padding is an operator of its own before this."""
    if isinstance(x, Complex) or isinstance(window, Complex):
        return NotImplemented
    *batch, length = x.shape
    bins = n_fft if onesided is False else n_fft // 2 + 1
    rows = dft.real_to_complex(n_fft, n_fft, bins, FORWARD, n_fft**-0.5 if normalized else 1.0)
    kernel = _windowed(call, rows, window, win_length, x.dtype)
    signal = x.reshape((math.prod(batch), 1, length))
    frames = signal.call(aten.conv1d.default, kernel, None, [hop_length or n_fft // 4])
    spectrum = Complex.from_stacked(frames, (*batch, bins, frames.shape[-1]), len(batch))
    return spectrum if call.value.is_complex() else emit(call.edit, aten.stack.default, list(spectrum.parts), -1)


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
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> Any:
    """(B, bins, frames) → conv_transpose1d with (2·bins, 1, n_fft), over the sum of the squared windows → (B, L)."""
    *batch, bins, frames = x.shape
    if return_complex or onesided is False or bins != n_fft // 2 + 1 or isinstance(window, Complex):
        return NotImplemented
    hop = [hop_length or n_fft // 4]
    rows = dft.complex_to_real(bins, n_fft, INVERSE, n_fft**-0.5 if normalized else 1 / n_fft).T
    kernel = _windowed(call, rows, window, win_length, call.dtype)
    weight = _windowed(call, torch.ones(1, n_fft), window, win_length, call.dtype)
    parts, _ = along(x, len(batch))
    parts = parts.reshape((math.prod(batch), 2 * bins, frames))
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
    return result.reshape((*batch, stop - start))


def _windowed(call: Call, rows: Tensor, window: Real | None, win_length: int | None, dtype: torch.dtype) -> Real:
    """Kernels (rows, 1, n_fft) times the window, which is centred in n_fft; all ones where there is none."""
    count, n_fft = rows.shape
    length = win_length or n_fft
    before = (n_fft - length) // 2
    margins = [before, n_fft - length - before]
    if window is None:
        rows = rows * torch.nn.functional.pad(torch.ones(length), margins)
    kernel = constant(call, f"dft_{count}x{n_fft}", rows, dtype).reshape((count, 1, n_fft))
    return kernel if window is None else kernel * window.call(aten.constant_pad_nd.default, margins, 0.0)
