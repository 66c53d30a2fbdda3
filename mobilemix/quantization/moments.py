"""Means and products of what a layer's weights are multiplied by.

A layer is a matrix: y = W x + b for each position of its output, x the K numbers that the position sees. What a change
ΔW of the weights does on average is then known without a sample: the mean of the error is ΔW E[x], its mean square
ΔW E[x xᵀ] ΔWᵀ (Nagel et al., arXiv 2004.10568, equations 11 to 13).
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from mobilemix.targets.base import Array

POSITIONS = 128
"""Positions of a value that are looked at in one sample: of a hundred samples, ten times what most layers have weights
in a row."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Of the numbers x that meet a row of weights, with G groups of K; those of several samples add up.

    Attributes:
        mean: E[x], float64 (G, K).
        second: E[x xᵀ], float64 (G, K, K).
        count: positions that were looked at.
    """

    mean: Array
    second: Array
    count: int

    def __add__(self, other: "Moments") -> "Moments":
        """The moments of the positions of both."""
        count = self.count + other.count
        share = self.count / count
        return Moments(
            share * self.mean + (1 - share) * other.mean, share * self.second + (1 - share) * other.second, count
        )

    def mean_change(self, change: Array) -> Array:
        """What a change of the weights (O, K), whose rows are in order of their groups, does on average: (O,)."""
        means: Array = (self._by_group(change) @ self.mean[..., None]).reshape(-1)
        return means

    def mean_square_change(self, change: Array) -> Array:
        """The mean square of what it does: (O,)."""
        rows = self._by_group(change)
        squares: Array = ((rows @ self.second) * rows).sum(-1).reshape(-1)
        return squares

    def _by_group(self, weights: Array) -> Array:
        return weights.astype(np.float64).reshape(len(self.mean), -1, self.mean.shape[1])


def of_conv(
    x: Array,
    kernel: Sequence[int],
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    groups: int = 1,
    *,
    seed: int = 0,
) -> Moments:
    """Moments of a convolution's input, in the order of the rows of `weight.reshape(O, -1)`.

    Args:
        x: (N, C, *spatial).
        kernel, strides, dilations: one number for each spatial axis.
        pads: of zeros, before each spatial axis, then after each, as ONNX writes them.
        groups: G, which divides C; then K is C / G times the size of the kernel.
        seed: of the choice of `POSITIONS`; another one for each sample.
    """
    rank = len(kernel)
    sizes = [
        (size + before + after - dilation * (width - 1) - 1) // stride + 1
        for size, before, after, dilation, width, stride in zip(
            x.shape[2:], pads[:rank], pads[rank:], dilations, kernel, strides, strict=True
        )
    ]
    samples, *places = np.unravel_index(_chosen(len(x) * math.prod(sizes), seed), (len(x), *sizes))
    padded = np.pad(x, [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    corners = [place * stride for place, stride in zip(places, strides, strict=True)]
    channels_last = np.moveaxis(padded, 1, -1)
    seen = [
        channels_last[(samples, *(c + d * o for c, d, o in zip(corners, dilations, offset, strict=True)))]
        for offset in itertools.product(*map(range, kernel))
    ]
    return _moments(np.stack(seen, axis=-1).reshape(len(samples), groups, -1))  # from (positions, C, kernel)


def of_matmul(x: Array, *, seed: int = 0) -> Moments:
    """Moments of what a matrix product sums over, the last axis: x (…, K), one group; `seed` as for `of_conv`."""
    rows = x.reshape(-1, x.shape[-1])
    return _moments(rows[_chosen(len(rows), seed), None])


def _chosen(count: int, seed: int) -> Array:
    if count <= POSITIONS:
        return np.arange(count)
    return np.random.Generator(np.random.PCG64(seed)).choice(count, POSITIONS, replace=False)


def _moments(rows: Array) -> Moments:
    """Of (positions, G, K)."""
    by_group = rows.astype(np.float64).swapaxes(0, 1)
    return Moments(by_group.mean(1), by_group.swapaxes(1, 2) @ by_group / len(rows), len(rows))
