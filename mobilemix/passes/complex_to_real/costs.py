"""What a Fourier transform costs in each of its forms, and the form that costs least.

The cost of a form is linear in what its operators do: calls, multiplications, numbers that they read and write.
`benchmarks/fft.py --fit` measures forms and prints `NANOSECONDS`; only ratios matter for the choice.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

from mobilemix.passes.complex_to_real.dft import Transform

Features = tuple[float, ...]

NANOSECONDS: dict[str, Features] = {
    "left": (954.0, 146.0, 0.0221, 0.0238, 0.0, 0.0514, 0.0553),
    "right": (826.0, 0.0182, 0.0, 0.1, 0.0164, 0.111),
    "transpose": (545.0, 0.157, 8.46, 0.173),
    "gather": (459.0, 0.16, 9.34, 0.197),
}
"""Weights of the features of each operator: one x86 core with AVX-512, ONNX Runtime, float32."""

MARGIN = 0.85
"""Part of the cost of dense matrices, axis by axis, below which another form has to stay: the model is off by less."""

_LARGEST, _STAGES = 64, 4
"""Factors and numbers of them that are tried."""

_LANES = 16
"""Multiple to which a matrix product is as good as rounded up along its contiguous axis."""

_NEAR = 2**18
"""Numbers that an operator reads and writes without leaving a core's own cache."""


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to compute a transform along the middle axis of (outer, inputs, inner).

    Attributes:
        factors: of its length, one for each stage; a single one means a dense matrix.
        around: whether the axis is brought to where the product is fastest, by a transposition before and one after:
            last for a dense matrix, first for several stages.
        operators: kind and features of each.
    """

    factors: tuple[int, ...]
    around: bool
    operators: tuple[tuple[str, Features], ...]

    @functools.cached_property
    def cost(self) -> float:
        """Nanoseconds."""
        terms = (zip(NANOSECONDS[kind], features, strict=True) for kind, features in self.operators)
        return sum(weight * feature for pairs in terms for weight, feature in pairs)


@functools.lru_cache(maxsize=4096)
def best(transform: Transform, outer: int, inner: int) -> Form:
    """The form that costs least for (outer, transform.inputs, inner)."""
    plain = dense(transform.inputs, transform.outputs, outer, inner)
    found = min(mixed(transform, outer, inner), key=lambda form: form.cost, default=plain)
    return found if found.cost < MARGIN * plain.cost else plain


def dense(inputs: int, outputs: int, outer: int, inner: int) -> Form:
    """A matrix (outputs, inputs) times (outer, inputs, inner)."""
    return min(dense_forms(inputs, outputs, outer, inner), key=lambda form: form.cost)


def dense_forms(inputs: int, outputs: int, outer: int, inner: int) -> Iterator[Form]:
    """From the right where the axis is the last; else from the left or, of several, between transpositions."""
    if inner == 1:
        yield Form((inputs,), False, (right(outer, inputs, outputs),))
        return
    yield Form((inputs,), False, (left(outer, outputs, inputs, inner),))
    if outer > 1:
        before, behind = (transpose(outer * inner * numbers, 1) for numbers in (inputs, outputs))
        yield Form((inputs,), True, (before, right(outer * inner, inputs, outputs), behind))


def mixed(transform: Transform, outer: int, inner: int) -> Iterator[Form]:
    """Several stages, for each way to write the length as a product."""
    before, behind = (transpose(outer * numbers, inner) for numbers in (transform.inputs, transform.outputs))
    for factors in _factorizations(transform.n):
        yield Form(factors, False, tuple(_stages(transform, factors, outer, inner)))
        if outer > 1:
            yield Form(factors, True, (before, *_stages(transform, factors, 1, outer * inner), behind))


def _stages(transform: Transform, factors: Sequence[int], outer: int, inner: int) -> Iterator[tuple[str, Features]]:
    half = transform.takes == "half" or transform.size < transform.n
    one_part = transform.takes == "real" or transform.one_part
    groups, behind = 1, transform.n
    for position, factor in enumerate(factors):
        behind //= factor
        kept = factor // 2 + 1 if half and position == 0 else factor
        parts = 1 if one_part and position == 0 else 2
        sizes = (parts * factor, 2 * kept) if transform.takes == "half" else (2 * kept, parts * factor)
        yield left(outer * groups, *sizes, behind * inner)
        groups *= kept
    reordered = 2 * groups if transform.takes == "half" else transform.outputs
    yield gather(outer * reordered, inner)


# Operators: calls, and whatever else takes time


def left(batch: int, rows: int, columns: int, width: int) -> tuple[str, Features]:
    """(rows, columns) @ (batch, columns, width): calls, products, multiplications, numbers in, out, far."""
    multiplications = batch * rows * columns
    wide = _round_up(width)
    by_matrix, by_vector = (multiplications * wide, 0) if width > 1 else (0, multiplications)
    far = _far(batch * (rows + columns) * width)
    return "left", (1, batch, by_matrix, by_vector, batch * columns * wide, batch * rows * wide, far)


def right(rows: int, inputs: int, outputs: int) -> tuple[str, Features]:
    """(rows, inputs) @ (inputs, outputs): calls, multiplications, numbers in, out, of the matrix, far."""
    multiplications = rows * inputs * _round_up(outputs)
    far = _far(rows * (inputs + outputs))
    return "right", (1, multiplications, rows * inputs, rows * outputs, inputs * outputs, far)


def transpose(runs: int, contiguous: int) -> tuple[str, Features]:
    """A transposition: calls, numbers, runs of numbers that stay together, numbers far."""
    return "transpose", (1, runs * contiguous, runs if contiguous > 1 else 0, _far(2 * runs * contiguous))


def gather(runs: int, contiguous: int) -> tuple[str, Features]:
    """A new order: calls, numbers, runs of numbers that stay together, numbers far."""
    return "gather", (1, runs * contiguous, runs, _far(2 * runs * contiguous))


def _far(numbers: int) -> int:
    return max(0, numbers - _NEAR)


def _round_up(width: int) -> int:
    return -(-width // _LANES) * _LANES


@functools.cache
def _factorizations(n: int) -> tuple[tuple[int, ...], ...]:
    """Ways to write n as a product, in any order, of two to four factors, none above `_LARGEST` but primes."""
    primes = [d for d in range(2, n + 1) if n % d == 0 and all(d % p for p in range(2, math.isqrt(d) + 1))]
    largest = max((_LARGEST, *primes))

    def products(rest: int, most: int) -> Iterator[tuple[int, ...]]:
        if rest <= largest:
            yield (rest,)
        if most > 1:
            for divisor in range(2, min(largest, rest // 2) + 1):
                if rest % divisor == 0:
                    yield from ((divisor, *others) for others in products(rest // divisor, most - 1))

    return tuple(factors for factors in products(n, _STAGES) if len(factors) > 1)
