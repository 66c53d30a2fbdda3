"""How many time steps of a scan make a chunk."""

from collections.abc import Iterable

UNROLLED = 16
"""Scans of up to so many steps are written step by step."""

_SIZES = range(7, UNROLLED + 1)


def chunk_size(length: int) -> int:
    """Steps per chunk of an elementwise recurrence, at most `length`.

    All chunks advance together, one step per operator; the scan over chunks is a shorter scan of the same kind. Of the
    sizes that need the least padding, the nearest to √length has the fewest operators. Between 7 and 16 the size hardly
    changes the time, because what is computed per chunk is little against what is computed per step.
    """
    return length if length <= UNROLLED else nearest(length, _SIZES, length**0.5)


def nearest(length: int, sizes: Iterable[int], wanted: float) -> int:
    """Of the chunk sizes that need the least padding, the one nearest to what is wanted."""
    return min(sizes, key=lambda size: (-length % size, abs(size - wanted)))
