"""Weights in few bits, as Core ML stores them: integers with scales in float16, or indices into palettes of float16.

`w8`       8 bits, a scale for each output channel (iOS 16)
`w4`       4 bits, a scale for each block of `BLOCKS` input channels of each output channel (iOS 18)
`palette8` 256 numbers for a tensor; `palette6` 64; `palette4` 16: one palette for a tensor, or from iOS 18 on one for
           each group of `GROUPS` output channels in the two smaller sizes, whose entries are few enough for that

Below 8 bits, two kinds of weights have the form of `w8` instead: those with input channels that no block divides, and
those with fewer than `FEW` for each output, as depthwise convolutions have. The errors of few products do not cancel:
on the trained flowers classifier `palette4` has two fifths less error for it.
"""

import dataclasses
import math
from typing import Protocol

import numpy as np

from mobilemix.quantization.affine import Grid, grid_between, to_integers
from mobilemix.quantization.moments import Moments
from mobilemix.quantization.rounding import adaround
from mobilemix.targets.base import Array
from mobilemix.targets.coreml.palette import nearest, palette

BLOCKS = (32, 16, 8)
"""Input channels that share a scale of `w4`: the first of these sizes that divides their number."""

GROUPS = (16, 8, 4)
"""Output channels that share a palette: likewise."""

PALETTES = {"palette8": 8, "palette6": 6, "palette4": 4}
"""Bits of an index by precision."""

FEW = 32
"""Weights for one output channel, the fewest that are stored in less than 8 bits."""

_GROUPED = 18
"""Oldest iOS with more than one palette for a tensor."""


class Dense(Protocol):
    """Weights in few bits."""

    @property
    def dense(self) -> Array:
        """The weights that they stand for, float32, as the device has them: rounded to float16."""


@dataclasses.dataclass(frozen=True)
class Integers:
    """Weights that are integers times a scale.

    Attributes:
        data: int8, of the weight's shape; 4-bit numbers come one a byte.
        scale: float16, of the weight's rank; its sizes divide the weight's.
        bits: 8 or 4.
    """

    data: Array
    scale: Array
    bits: int

    @property
    def dense(self) -> Array:
        """See `Dense`."""
        return _halves(self.data * spread(self.scale.astype(np.float32), self.data.shape))


@dataclasses.dataclass(frozen=True)
class Palettes:
    """Weights that are entries of a palette.

    Attributes:
        indices: uint8, of the weight's shape.
        entries: float16 (groups, entries), ascending; each is for as many output channels, the weight's first axis.
        bits: of an index, 8, 6 or 4.
    """

    indices: Array
    entries: Array
    bits: int

    @property
    def dense(self) -> Array:
        """See `Dense`."""
        groups = len(self.entries)
        rows = self.indices.reshape(groups, -1)
        return np.take_along_axis(self.entries, rows.astype(np.int64), 1).reshape(self.indices.shape).astype(np.float32)

    @property
    def tables(self) -> Array:
        """The entries as iOS 18 has them: (groups, 1, …, entries, 1)."""
        return self.entries.reshape(len(self.entries), *[1] * (self.indices.ndim - 1), -1, 1)


Form = Integers | Palettes


def compress(weight: Array, precision: str, ios: int, moments: Moments | None = None) -> Form:
    """A weight in the form of a precision.

    Args:
        weight: (output channels, input channels of a group, …).
        precision: "int8" (its weights are those of w8), "w8", "w4" or one of `PALETTES`.
        ios: oldest version that must read it.
        moments: of the layer's input, to round the weights for what they do together; None rounds each to the nearest.
    """
    bits = bits_of(precision, weight.shape)
    if precision in PALETTES and bits == PALETTES[precision]:
        return _palettes(weight, bits, ios)
    return _integers(weight, bits, weight.shape[1] if bits == 8 else _first(BLOCKS, weight.shape[1]) or 1, moments)


def bits_of(precision: str, shape: tuple[int, ...]) -> int:
    """Bits of an integer or an index of a weight (output channels, input channels of a group, …)."""
    if math.prod(shape[1:]) < FEW:
        return 8
    return PALETTES.get(precision, 4 if precision == "w4" and _first(BLOCKS, shape[1]) else 8)


def spread(scale: Array, shape: tuple[int, ...]) -> Array:
    """A scale for each weight: one that is for a block is repeated."""
    for axis, size in enumerate(shape):
        scale = np.repeat(scale, size // scale.shape[axis], axis)
    return scale


def half_up(scale: Array) -> Array:
    """Float16, rounded up, so that no weight is beyond the last integer."""
    rounded = scale.astype(np.float16)
    up: Array = np.where(rounded < scale, np.nextafter(rounded, np.float16(np.inf)), rounded)
    return up


def _integers(weight: Array, bits: int, block: int, moments: Moments | None) -> Integers:
    """Symmetric about zero, the most negative integer left out."""
    outputs, inputs, *kernel = weight.shape
    blocks = np.abs(weight).reshape(outputs, inputs // block, block, -1).max(axis=(2, 3))
    grid = grid_between(-blocks, blocks, bits=bits, narrow=True)
    scale = half_up(grid.scale).reshape(outputs, inputs // block, *(1 for _ in kernel))
    each = spread(scale.astype(np.float32), weight.shape).reshape(outputs, -1)
    by_weight = Grid(each, np.zeros(each.shape, np.int32), grid.low, grid.high)
    rows = weight.reshape(outputs, -1)
    data = to_integers(rows, by_weight) if moments is None else adaround(rows, by_weight, moments)
    return Integers(data.reshape(weight.shape), scale, bits)


def _palettes(weight: Array, bits: int, ios: int) -> Palettes:
    size = _first(GROUPS, weight.shape[0]) if ios >= _GROUPED and bits < 8 else None
    groups = weight.reshape(weight.shape[0] // size if size else 1, -1)
    entries = np.stack([palette(group, 1 << bits) for group in groups])
    indices = np.stack([nearest(group, own) for group, own in zip(groups, entries, strict=True)])
    return Palettes(indices.reshape(weight.shape), entries, bits)


def _first(sizes: tuple[int, ...], total: int) -> int | None:
    """The first of the sizes that divides a total."""
    return next((size for size in sizes if total % size == 0), None)


def _halves(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float32)
