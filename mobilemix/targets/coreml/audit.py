"""Do the numbers of a program fit float16? An audit of the float32 build, executed on samples.

Float16 ends at 65504, and below 2⁻¹⁴ it loses precision bit by bit (subnormal numbers) until 2⁻²⁴; hardware may flush
that whole range to zero. Only values and weights that are float16 in the fp16 package are audited.
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from mobilemix.targets.base import LARGEST_HALF
from mobilemix.targets.coreml.package import Package
from mobilemix.threads import spread

SMALLEST_NORMAL = 2.0**-14
"""Smallest float16 with full precision."""

FAINT = 0.01
"""A value that lives in subnormals: flushing them would change it by more than this in relative L2.

That is reported and does not fail the audit. What the lower precision does to the outputs is part of the end-to-end
comparison, and Core ML counts on subnormals being kept: coremltools raises a vanishing epsilon to the smallest of them.
"""


@dataclasses.dataclass(frozen=True)
class Range:
    """What was seen of one value, or of one stored weight, over all samples.

    Attributes:
        name: of the value in the graph.
        largest: the largest finite magnitude; not a number if any element is.
        subnormal: share of the non-zero elements below the smallest normal float16.
        lost: relative L2 error if those were flushed to zero.
    """

    name: str
    largest: float
    subnormal: float
    lost: float

    @property
    def overflows(self) -> bool:
        """Whether it becomes infinite on the device, which fails the audit; not a number counts.

        What is infinite in the float32 build is infinite in the model, as masks are: float16 holds it as it is.
        """
        return not self.largest <= LARGEST_HALF


@dataclasses.dataclass(frozen=True)
class Audit:
    """Ranges of all values and weights."""

    ranges: tuple[Range, ...]

    @property
    def overflowing(self) -> tuple[Range, ...]:
        """Those that float16 cannot hold, in execution order."""
        return tuple(each for each in self.ranges if each.overflows)

    @property
    def largest(self) -> Range:
        """The one that comes closest to overflow, if none overflows."""
        return max(self.ranges, key=lambda each: each.largest)

    @property
    def faint(self) -> tuple[Range, ...]:
        """Those that live in subnormals."""
        return tuple(each for each in self.ranges if each.lost > FAINT)

    @property
    def faintest(self) -> Range:
        """The one that would lose most by flushing."""
        return max(self.ranges, key=lambda each: each.lost)


def audit(package: Package, runs: Iterable[Iterable[tuple[str, np.ndarray]]], names: Collection[str]) -> Audit:
    """Measure the ranges of the values called `names` and of the weights of the float32 build `package`.

    Args:
        package: the float32 build.
        runs: for each sample, every value as (name, array).
        names: which values and constants are float16 in the package that will run.
    """

    def measured(values: Iterable[tuple[str, np.ndarray]]) -> list[tuple[str, _Seen]]:
        return [(name, _Seen.of(value)) for name, value in values if name in names]

    seen: dict[str, _Seen] = {}
    for name, one in itertools.chain(*spread(measured, [*runs, _weights(package)])):
        seen[name] = seen[name] + one if name in seen else one
    return Audit(tuple(each.range(name) for name, each in seen.items()))


def _weights(package: Package) -> Iterator[tuple[str, np.ndarray]]:
    """Constants of the weight file.

    Smaller ones, such as the epsilon of a norm, are parameters rather than weights: they are often subnormal by
    design, and the comparison of the two programs checks how they were rounded.
    """
    for operation in package.operations:
        if operation.type == "const" and (constant := operation.attributes["val"]).file_offset is not None:
            yield operation.outputs[0].name, constant.array


class _Seen(NamedTuple):
    """Of the finite elements: the largest magnitude, counts, and sums of squares of all and of those to be flushed."""

    largest: float
    nonzero: int
    subnormal: int
    energy: float
    lost: float

    @classmethod
    def of(cls, value: np.ndarray) -> "_Seen":
        magnitude = np.abs(value).ravel()
        if np.isinf(magnitude).any():
            magnitude = magnitude[~np.isinf(magnitude)]
        small = magnitude[magnitude < SMALLEST_NORMAL].astype(np.float64)
        wide = magnitude.astype(np.float64)
        return cls(
            largest=float(np.max(magnitude, initial=0)),
            nonzero=int(np.count_nonzero(magnitude)),
            subnormal=int(np.count_nonzero(small)),
            energy=float(wide @ wide),
            lost=float(small @ small),
        )

    def __add__(self, other: "_Seen") -> "_Seen":  # type: ignore[override]
        return _Seen(
            largest=float(np.maximum(self.largest, other.largest)),  # not a number stays
            nonzero=self.nonzero + other.nonzero,
            subnormal=self.subnormal + other.subnormal,
            energy=self.energy + other.energy,
            lost=self.lost + other.lost,
        )

    def range(self, name: str) -> Range:
        return Range(
            name,
            self.largest,
            self.subnormal / self.nonzero if self.nonzero else 0.0,
            (self.lost / self.energy) ** 0.5 if self.energy else 0.0,
        )
