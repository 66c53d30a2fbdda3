"""Integers that stand for real numbers: x ≈ (q − zero point) · scale (Jacob et al., arXiv 1712.05877, equation 1)."""

import dataclasses

import numpy as np

from mobilemix.targets.base import Array


@dataclasses.dataclass(frozen=True)
class Grid:
    """A set of numbers at equal distances.

    Attributes:
        scale: the distance, float32: () for all, or (C,) along `axis`.
        zero_point: the integer that stands for 0, int32, of the shape of `scale`.
        low, high: smallest and largest integer.
        axis: of the array that `scale` runs along; None for one scale.
    """

    scale: Array
    zero_point: Array
    low: int
    high: int
    axis: int | None = None

    @property
    def dtype(self) -> type[np.integer]:
        """NumPy's type that holds the integers; those of four bits come one a byte."""
        return np.int8 if self.low < 0 else np.uint8


def grid_between(
    lowest: Array | float,
    highest: Array | float,
    *,
    bits: int = 8,
    signed: bool = True,
    symmetric: bool = True,
    narrow: bool = False,
    axis: int | None = None,
) -> Grid:
    """The grid of so many bits that spans a range, and 0, exactly.

    Args:
        lowest, highest: the range: numbers, or (C,) along `axis`.
        bits: of the integers.
        signed: whether they are from −2^(bits−1), or from 0.
        symmetric: whether 0 stands for itself, or half of the unsigned integers do: then the range is widened to one
            about 0. Otherwise the zero point is where the range puts it.
        narrow: whether the smallest integer is left out, so that as many are below 0 as above.
        axis: see `Grid`.
    """
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    low += narrow
    first = np.minimum(np.asarray(lowest, np.float64), 0)
    last = np.maximum(np.asarray(highest, np.float64), 0)
    if symmetric:
        middle = (low + high + 1) // 2
        span = np.maximum(-first, last) / (high - middle)
        zero_point = np.full_like(span, middle)
    else:
        span = (last - first) / (high - low)
        zero_point = low - first / np.where(span > 0, span, 1)
    scale = np.where(span > np.finfo(np.float32).tiny, span, 1).astype(np.float32)
    return Grid(scale, np.rint(np.clip(zero_point, low, high)).astype(np.int32), low, high, axis)


def to_integers(values: Array, grid: Grid) -> Array:
    """The nearest integers, ties to even, clipped to the grid's: int8 or uint8."""
    scale, zero_point = (_along(each, values, grid.axis) for each in (grid.scale, grid.zero_point))
    integers: Array = np.clip(np.rint(values / scale) + zero_point, grid.low, grid.high).astype(grid.dtype)
    return integers


def from_integers(integers: Array, grid: Grid) -> Array:
    """The numbers that integers stand for, float32."""
    scale, zero_point = (_along(each, integers, grid.axis) for each in (grid.scale, grid.zero_point))
    values: Array = ((integers.astype(np.int32) - zero_point) * scale).astype(np.float32)
    return values


def _along(content: Array, values: Array, axis: int | None) -> Array:
    if axis is None:
        return content
    shape = [1] * values.ndim
    shape[axis] = -1
    return content.reshape(shape)
