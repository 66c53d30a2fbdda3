"""Fourier transforms of composite length as a few small real matrix products (Cooley and Tukey 1965), in float64.

With n = n₁·n₂·…, an index of the signal is j = (j₁·n₂ + j₂)·n₃ + …, one of the spectrum k = k₁ + n₁·(k₂ + n₂·…).
Stage s sums over j_s, which makes k_s of it, for all of k₁ … k_{s−1} before it and of j_{s+1} … behind it:

    Σ exp(sign · 2πi · j_s · (k₁ + n₁·k₂ + … + n₁⋯n_{s−1}·k_s) / (n₁⋯n_s)) over j_s

The angle depends on all of k₁ … k_s, so what textbooks call twiddle factors lies in the matrices: a stage has one for
each k₁ … k_{s−1}, (groups, 2·n_s, 2·n_s) in all, and multiplies (groups, 2·n_s, whatever lies behind). Between stages
nothing has to be moved; in the end the spectrum is brought from the order k₁, k₂, … to that of k.

The matrices of a real signal stop at k₁ = n₁ // 2: what is left out are conjugates of what is not. The last stage
conjugates where k > n / 2, and the order takes every entry of the half spectrum from k or from n − k.

The transposed network computes the transform from the last stage to the first, with the spectrum's order as that of its
input. It is what makes a signal of a half spectrum, since the matrix of that is the transposed one of the other
direction, up to weights; between complex numbers it is an alternative, which takes them in any order.
"""

import dataclasses
import functools
import math

import torch
from torch import Tensor

from mobilemix.passes.complex_to_real.dft import Transform, waves


@dataclasses.dataclass(frozen=True)
class Network:
    """Stages to apply one after the other, and how to reorder (part, index) behind them, or before if transposed.

    Attributes:
        stages: (groups, rows, columns) each.
        order: which row of the stages' output each entry of the result is, or which entry of the input each is that
            they take.
        transposed: whether the order comes first.
        signal: entries of each part of the input.
        taken: how many of them count.
        padded: to how many they have to be filled up with zeros.
    """

    stages: tuple[Tensor, ...]
    order: Tensor
    transposed: bool
    signal: int
    taken: int
    padded: int


def is_transposed(transform: Transform, interleaved_input: bool) -> bool:
    """Whether it is the transposed network that computes a transform."""
    return transform.takes == "half" or (transform.takes == "complex" and interleaved_input)


@functools.lru_cache(maxsize=64)
def network(
    transform: Transform, factors: tuple[int, ...], interleaved_input: bool, interleaved_output: bool
) -> Network:
    """The stages of a transform for the factors n₁, n₂, … of its length.

    Complex numbers lie as (part, index), or as (index, part) where interleaved; the output of a transposed network is
    never interleaved.
    """
    if is_transposed(transform, interleaved_input):
        return _transposed(transform, factors, interleaved_input)
    return _straight(transform, factors, interleaved_output)


def _straight(transform: Transform, factors: tuple[int, ...], interleaved_output: bool) -> Network:
    stages, entries = _stages(transform, factors, transform.sign)
    behind = transform.n // factors[0]
    taken = min(transform.signal, transform.n)
    padded = math.ceil(taken / behind) * behind
    stages[0] = stages[0][..., : padded // behind]
    if transform.takes == "real":
        stages[0] = stages[0][..., :1, :]
    order = torch.empty(transform.size, dtype=torch.int64)
    order[entries] = torch.arange(len(entries))
    if transform.one_part:
        stages[-1] = stages[-1][:, :, :1]
    else:
        both = torch.stack((2 * order, 2 * order + 1))
        order = (both.T if interleaved_output else both).flatten()
    return Network(tuple(map(_matrices, stages)), order, False, transform.signal, taken, padded)


def _transposed(transform: Transform, factors: tuple[int, ...], interleaved_input: bool) -> Network:
    stages, entries = _stages(transform, factors, -transform.sign)
    signal = transform.signal
    if transform.takes == "half":  # where n₁ − k₁ was left out, k₁ stands for both
        once = 2 * torch.arange(stages[0].shape[1]) % factors[0] == 0
        stages[0] *= torch.where(once, 1.0, 2.0)[:, None, None, None]
    if transform.one_part:
        stages[0] = stages[0][..., :1, :]
    stages[-1][(entries >= signal).reshape(stages[-1].shape[:2])] = 0
    entries = entries.clamp(max=signal - 1)
    both = (2 * entries, 2 * entries + 1) if interleaved_input else (entries, signal + entries)
    matrices = tuple(_matrices(stage).transpose(1, 2).contiguous() for stage in reversed(stages))
    return Network(matrices, torch.stack(both, 1).flatten(), True, signal, signal, signal)


def _stages(transform: Transform, factors: tuple[int, ...], sign: int) -> tuple[list[Tensor], Tensor]:
    """Stages as (groups, k, part of the output, part of the input, j), and which entry each k of the last one is."""
    n, half = transform.n, transform.takes == "half" or transform.size < transform.n
    stages = []
    frequency, length = torch.zeros(1, dtype=torch.int64), 1
    for position, factor in enumerate(factors):
        kept = factor // 2 + 1 if half and position == 0 else factor
        frequencies = frequency[:, None] + length * torch.arange(kept)
        length *= factor
        cosine, sine = waves(frequencies[..., None] * torch.arange(factor), length)
        share = transform.scale ** (math.log(factor) / math.log(n))  # to each its part, lest float16 overflow in one
        re, im = share * cosine, share * sign * sine
        stages.append(torch.stack((torch.stack((re, -im), 2), torch.stack((im, re), 2)), 2))
        frequency = frequencies.flatten()
    if not half:
        return stages, frequency
    stages[-1][:, :, 1] *= torch.where(2 * frequencies > n, -1.0, 1.0)[..., None, None]
    return stages, torch.minimum(frequency, n - frequency)


def _matrices(stage: Tensor) -> Tensor:
    return stage.flatten(3).flatten(1, 2)
