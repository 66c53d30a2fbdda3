"""What a Fourier transform costs in each of its forms, and the form that costs least.

The cost of an operator is linear in what it does: calls, multiplications, numbers that it reads and writes.
`benchmarks/fft.py --fit` measures single operators and prints `NANOSECONDS`; only ratios matter for the choice.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

from mobilemix.passes.complex_to_real.dft import Transform

NANOSECONDS = {
    "left": (1100.0, 125.0, 0.0195, 0.026, 0.074, 0.047),
    "right": (950.0, 0.0173, 0.021, 0.043, 0.023),
    "transpose": (900.0, 0.129, 10.0),
    "gather": (860.0, 0.10, 6.8),
}
"""Weights of the features below: one x86 core with AVX-512, ONNX Runtime, float32."""

_LANES = 16
"""Multiple to which a matrix product is as good as rounded up along its contiguous axis."""

MARGIN = 0.85
"""Part of the cost of dense matrices, axis by axis, below which another form has to stay: the model is off by less."""


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to compute a transform along the middle axis of (outer, inputs, inner).

    Attributes:
        factors: of its length, one for each stage; a single one means a dense matrix.
        around: whether the axis is brought to where the product is fastest, by a transposition before and one after:
            last for a dense matrix, first for several stages.
        cost: nanoseconds.
    """

    factors: tuple[int, ...]
    around: bool
    cost: float


def left(batch: int, rows: int, columns: int, width: int) -> tuple[float, ...]:
    """Features of (rows, columns) @ (batch, columns, width): calls, products, multiplications, numbers in and out."""
    multiplications = batch * rows * columns
    wide = _round_up(width)
    by_matrix, by_vector = (multiplications * wide, 0) if width > 1 else (0, multiplications)
    return 1, batch, by_matrix, by_vector, batch * columns * wide, batch * rows * wide


def right(rows: int, inputs: int, outputs: int) -> tuple[float, ...]:
    """Features of (rows, inputs) @ (inputs, outputs): calls, multiplications, numbers in, out, and of the matrix."""
    return 1, rows * inputs * _round_up(outputs), rows * inputs, rows * outputs, inputs * outputs


def transpose(runs: int, contiguous: int) -> tuple[float, ...]:
    """Features of a transposition: calls, numbers, and runs of numbers that stay together."""
    return 1, runs * contiguous, runs if contiguous > 1 else 0


def gather(runs: int, contiguous: int) -> tuple[float, ...]:
    """Features of a reordering: calls, numbers, and runs of numbers that stay together."""
    return 1, runs * contiguous, runs


def cost(operator: str, features: tuple[float, ...]) -> float:
    """Nanoseconds."""
    return sum(weight * feature for weight, feature in zip(NANOSECONDS[operator], features, strict=True))


@functools.lru_cache(maxsize=4096)
def best(transform: Transform, outer: int, inner: int) -> Form:
    """The form that costs least for (outer, transform.inputs, inner)."""
    plain = dense(transform.inputs, transform.outputs, outer, inner)
    mixed = min(_mixed(transform, outer, inner), key=lambda form: form.cost, default=plain)
    return mixed if mixed.cost < MARGIN * plain.cost else plain


def dense(inputs: int, outputs: int, outer: int, inner: int) -> Form:
    """A matrix (outputs, inputs) times (outer, inputs, inner)."""
    if inner == 1:
        return Form((inputs,), False, cost("right", right(outer, inputs, outputs)))
    inside = cost("left", left(outer, outputs, inputs, inner))
    moved = sum(cost("transpose", transpose(outer * inner * numbers, 1)) for numbers in (inputs, outputs))
    around = cost("right", right(outer * inner, inputs, outputs)) + moved
    return Form((inputs,), outer > 1 and around < inside, min(inside, around) if outer > 1 else inside)


def _mixed(transform: Transform, outer: int, inner: int) -> Iterator[Form]:
    for factors in _factorizations(transform.n):
        yield Form(factors, False, _stages(transform, factors, outer, inner))
        if outer > 1:
            runs = outer * (transform.inputs + transform.outputs)
            moved = cost("transpose", transpose(runs, inner)) + cost("transpose", (1, 0, 0))
            yield Form(factors, True, _stages(transform, factors, 1, outer * inner) + moved)


def _stages(transform: Transform, factors: Sequence[int], outer: int, inner: int) -> float:
    half = transform.takes == "half" or transform.size < transform.n
    one_part = transform.takes == "real" or transform.one_part
    total, groups, behind = 0.0, 1, transform.n
    for position, factor in enumerate(factors):
        behind //= factor
        first = position == 0
        kept = factor // 2 + 1 if first and half else factor
        parts = 1 if first and one_part else 2
        total += cost("left", left(outer * groups, 2 * kept, parts * factor, behind * inner))
        groups *= kept
    reordered = 2 * groups if transform.takes == "half" else transform.outputs
    return total + cost("gather", gather(outer * reordered, inner))


@functools.cache
def _factorizations(n: int, most: int = 3) -> tuple[tuple[int, ...], ...]:
    """Ordered factorizations of n into at least two and at most `most` factors above 1."""
    divisors = [d for d in range(2, n // 2 + 1) if n % d == 0]
    pairs = [(d, n // d) for d in divisors]
    return (*pairs, *((d, *rest) for d in divisors for rest in _factorizations(n // d, most - 1) if most > 2))


def _round_up(width: int) -> int:
    return -(-width // _LANES) * _LANES
