"""Palettes: the few numbers that stand for all weights of a tensor, by k-means in one dimension.

In one dimension the clusters are intervals, so that one sorting and sums over prefixes make an iteration of Lloyd's
algorithm (Lloyd, 1982) cost as much as the palette is long, whatever the tensor is. Nothing is drawn at random: the
iteration starts from quantiles, and the same weights have the same palette on every machine.
"""

import numpy as np

from mobilemix.targets.base import Array

ITERATIONS = 300
"""At most; k-means of weights is at rest after some dozens."""

STARTS = (1.0, 1 / 3, 0.0)
"""How densely the first centres lie where weights are dense: as those, as their cube root (the least squared error of
many levels, Panter and Dite, 1951), or evenly. The best end of the three counts."""


def palette(values: Array, size: int) -> Array:
    """So many numbers, ascending, float16, that are near to all values in the mean of squares.

    Args:
        values: of any shape, within float16.
        size: how many numbers; the last is repeated if there are fewer different values.
    """
    ordered = np.sort(values.ravel().astype(np.float64))
    distinct = np.unique(ordered.astype(np.float16))
    if distinct.size <= size:
        return np.concatenate([distinct, np.repeat(distinct[-1:], size - distinct.size)])
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    ends = [_settled(ordered, sums, _first(ordered, size, power)) for power in STARTS]
    return min((each.astype(np.float16) for each in ends), key=lambda entries: _error(ordered, entries))


def nearest(values: Array, entries: Array) -> Array:
    """Index of the nearest of ascending entries for each value, uint8; of two as near, the smaller."""
    wide = entries.astype(np.float64)
    indices: Array = np.searchsorted((wide[1:] + wide[:-1]) / 2, values.astype(np.float64)).astype(np.uint8)
    return indices


def _first(ordered: Array, size: int, power: float) -> Array:
    """Centres whose density is that of the values to a power."""
    counts, edges = np.histogram(ordered, bins=max(4 * size, 64))
    weight = np.concatenate([[0.0], np.cumsum(counts**power)])
    shares = (np.arange(size) + 0.5) / size * weight[-1]
    centres: Array = np.interp(shares, weight, edges)
    return centres


def _settled(ordered: Array, sums: Array, centres: Array) -> Array:
    """Lloyd's iteration until nothing moves; a centre that no value is near to stays where it is."""
    for _ in range(ITERATIONS):
        borders = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2)
        bounds = np.concatenate([[0], borders, [ordered.size]])
        counts = np.diff(bounds)
        moved = np.where(counts > 0, np.diff(sums[bounds]) / np.maximum(counts, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _error(ordered: Array, entries: Array) -> float:
    return float(np.square(entries[nearest(ordered, entries)].astype(np.float64) - ordered).sum())
