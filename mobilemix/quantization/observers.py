"""Which range of a value 8 bits should span: what is beyond it is clipped, what is inside is rounded.

A wide range clips nothing and rounds coarsely. Each observer is shown the value for one sample after another and then
asked for the range. All but the first two look at a histogram whose bins are the squares of float16's numbers, with
their signs: it needs no range to begin with, is the same in whatever order the samples come, and is exact to 10 bits
from 4e-9 to 4e9.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np

from mobilemix.errors import InputError
from mobilemix.quantization.affine import from_integers, grid_between, to_integers
from mobilemix.quantization.options import OBSERVERS as NAMES
from mobilemix.targets.base import LARGEST_HALF, Array

SAMPLED = 20_000
"""Numbers of a value that a histogram takes from one sample."""
MOMENTUM = 0.9
"""Weight of the samples before, in a moving average of ranges."""
TAIL = 1e-5
"""Share of a value's numbers that the percentile observer clips, at both ends together: the 99.999th percentile.

With the 99.99th, the logits of a trained AFFNet are up to 40 % off on pictures that were not among the samples; with
this, 13 %."""
SHARES = tuple(share / 20 for share in range(6, 21))
"""Of the whole range, those whose squared error is compared."""
FINE = 4096
"""Bins between the ends of a value whose squared error is compared: sixteen in a step of 8 bits."""
BINS, LEVELS = 2048, 128
"""Of the histogram of magnitudes whose entropy is compared, and of its quantised form."""


class Observer(Protocol):
    """Told of one value, sample by sample."""

    def observe(self, value: Array) -> None:
        """Take one sample's numbers into account: of any shape, finite."""

    def range(self, symmetric: bool) -> tuple[float, float]:
        """The smallest and the largest number to represent; if symmetric, the one is the other's negative."""


def show(observers: Mapping[str, Observer], name: str, value: Array) -> None:
    """Let the observer of a value see one sample's numbers.

    Raises:
        InputError: one is infinite or not a number, for which no range is right.
    """
    if not np.isfinite(value).all():
        raise InputError(
            f"'{name}' is not finite on the calibration data; does the model hold in float16, or the data?"
        )
    observers[name].observe(value)


class MinMax:
    """The whole range: nothing is clipped."""

    def __init__(self) -> None:
        """Nothing was seen."""
        self._low, self._high = 0.0, 0.0

    def observe(self, value: Array) -> None:
        """See `Observer`."""
        self._low = min(self._low, float(value.min(initial=0)))
        self._high = max(self._high, float(value.max(initial=0)))

    def range(self, symmetric: bool) -> tuple[float, float]:
        """See `Observer`."""
        return _about_zero(self._low, self._high, symmetric)


class MovingAverage:
    """The exponentially weighted mean of the samples' ranges (arXiv 1712.05877, section 3.1): of those of late."""

    def __init__(self) -> None:
        """Nothing was seen."""
        self._low: float | None = None
        self._high = 0.0

    def observe(self, value: Array) -> None:
        """See `Observer`."""
        low, high = float(value.min(initial=0)), float(value.max(initial=0))
        if self._low is None:
            self._low, self._high = low, high
        self._low = MOMENTUM * self._low + (1 - MOMENTUM) * low
        self._high = MOMENTUM * self._high + (1 - MOMENTUM) * high

    def range(self, symmetric: bool) -> tuple[float, float]:
        """See `Observer`."""
        return _about_zero(self._low or 0.0, self._high, symmetric)


class _Histogram:
    """How often each of `_NUMBERS` occurs, and the exact ends."""

    def __init__(self) -> None:
        self._ends = MinMax()
        self._counts = np.zeros(len(_NUMBERS), np.int64)

    def observe(self, value: Array) -> None:
        """See `Observer`."""
        self._ends.observe(value)
        some = value.ravel()[:: value.size // SAMPLED | 1]  # odd, so that no column of an image is left out
        roots = np.copysign(np.minimum(np.sqrt(np.abs(some)), LARGEST_HALF), some).astype(np.float16)
        self._counts += np.bincount(_RANK[roots.view(np.uint16)], minlength=len(_NUMBERS))

    def _seen(self) -> tuple[Array, Array]:
        """The numbers that occur, and how often."""
        (places,) = self._counts.nonzero()
        return _NUMBERS[places], self._counts[places]


class Percentile(_Histogram):
    """The range without the outermost share `TAIL` of the numbers."""

    def range(self, symmetric: bool) -> tuple[float, float]:
        """See `Observer`."""
        numbers, counts = self._seen()
        if not counts.size:
            return 0.0, 0.0
        if symmetric:
            return _about_zero(0.0, _quantile(*_sorted(np.abs(numbers), counts), 1 - TAIL), symmetric)
        low, high = (_quantile(numbers, counts, share) for share in (TAIL / 2, 1 - TAIL / 2))
        return min(low, 0.0), max(high, 0.0)


class SquaredError(_Histogram):
    """The range at which 8 bits have the least squared error, of `SHARES` of the whole."""

    def range(self, symmetric: bool) -> tuple[float, float]:
        """See `Observer`."""
        low, high = self._ends.range(symmetric)
        numbers, counts = _coarse(*self._seen())

        def error(ends: tuple[float, float]) -> float:
            grid = grid_between(*ends, signed=symmetric, symmetric=symmetric, narrow=symmetric)
            return float(counts @ np.square(from_integers(to_integers(numbers, grid), grid) - numbers))

        best = min(((share * low, share * high) for share in SHARES), key=error)
        if symmetric:
            return best
        # The ends of a one-sided value are not alike: each is tried by itself, from where both are best.
        best = min(((share * low, best[1]) for share in SHARES), key=error)
        return min(((best[0], share * high) for share in SHARES), key=error)


class Entropy(_Histogram):
    """The range whose 8-bit form tells least from the value: the least Kullback-Leibler divergence.

    Source: S. Migacz, "8-bit inference with TensorRT", GTC 2017. Magnitudes are looked at, in `BINS` bins of which the
    first are kept and spread over `LEVELS`; but for 0, which every grid holds exactly, and a ReLU leaves much of.
    """

    def range(self, symmetric: bool) -> tuple[float, float]:
        """See `Observer`."""
        low, high = self._ends.range(symmetric)
        numbers, counts = self._seen()
        largest = max(-low, high)
        if not largest:
            return low, high
        places = np.minimum((np.abs(numbers) / largest * BINS).astype(np.int64), BINS - 1)
        histogram = np.bincount(places, np.where(numbers == 0, 0, counts), minlength=BINS)
        kept = min(range(LEVELS, BINS + 1, LEVELS // 8), key=lambda kept: _divergence(histogram, kept))
        threshold = largest * kept / BINS
        return max(low, -threshold), min(high, threshold)


OBSERVERS: Mapping[str, Callable[[], Observer]] = dict(
    zip(NAMES, (MinMax, MovingAverage, Percentile, Entropy, SquaredError), strict=True)
)


def _about_zero(low: float, high: float, symmetric: bool) -> tuple[float, float]:
    largest = max(-low, high)
    return (-largest, largest) if symmetric else (low, high)


def _sorted(numbers: Array, counts: Array) -> tuple[Array, Array]:
    order = np.argsort(numbers)
    return numbers[order], counts[order]


def _quantile(numbers: Array, counts: Array, share: float) -> float:
    """The smallest of ascending numbers that has at least this share of the counts at or below it."""
    total = np.cumsum(counts)
    return float(numbers[np.searchsorted(total, share * total[-1])])


def _coarse(numbers: Array, counts: Array) -> tuple[Array, Array]:
    """The means of `FINE` bins of ascending numbers, and their counts."""
    if not numbers.size:
        return numbers, counts
    width = (numbers[-1] - numbers[0]) / FINE or 1.0
    places = np.minimum((numbers - numbers[0]) / width, FINE - 1).astype(np.int64)
    total = np.bincount(places, counts)
    occupied = total > 0
    return np.bincount(places, counts * numbers)[occupied] / total[occupied], total[occupied]


def _divergence(histogram: Array, kept: int) -> float:
    """Of the first bins, the rest added to the last of them, from the same in `LEVELS` levels."""
    first = histogram[:kept]
    reference = first.copy()
    reference[-1] += histogram[kept:].sum()
    levels = np.arange(kept) * LEVELS // kept
    occupied = first > 0
    # Each level is spread evenly over its bins that are not empty.
    mean = np.bincount(levels, first, LEVELS) / np.maximum(np.bincount(levels, occupied, LEVELS), 1)
    quantised = np.where(occupied, mean[levels], 0)
    p, q = reference / reference.sum(), quantised / max(quantised.sum(), 1)
    both = (p > 0) & (q > 0)
    # Numbers that the quantised form has no place for count as if it had the share of one.
    missing = p[(p > 0) & (q == 0)]
    return float((p[both] * np.log(p[both] / q[both])).sum() + (missing * np.log(missing * histogram.sum())).sum())


_HALVES = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(np.float16)
_FINITE = np.flatnonzero(np.isfinite(_HALVES))
_ORDER = _FINITE[np.argsort(_HALVES[_FINITE], kind="stable")]
_NUMBERS = _HALVES[_ORDER].astype(np.float64) * np.abs(_HALVES[_ORDER].astype(np.float64))
"""The square of every finite number of float16, with its sign, ascending."""
_RANK = np.zeros(1 << 16, np.int64)
_RANK[_ORDER] = np.arange(len(_ORDER))
"""The place in `_NUMBERS` of the square of the float16 with these bits."""
