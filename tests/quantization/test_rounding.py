import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilemix.quantization import rounding
from mobilemix.quantization.affine import Grid, from_integers, grid_between, to_integers
from mobilemix.quantization.moments import Moments, of_conv, of_matmul
from mobilemix.quantization.rounding import adaround, bias_correction

TOLERANCE = 1e-6
LEFT = 0.6
"""Of nearest rounding's mean square error, on inputs as unlike in size and as correlated as activations."""


def inputs(count: int, size: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mix = generator.standard_normal((size, size)) / np.sqrt(size) * np.exp(generator.standard_normal(size))
    return np.maximum(generator.standard_normal((count, size)) @ mix + 0.3, 0)


def moments_of(x: np.ndarray) -> Moments:
    return sum((of_matmul(part) for part in np.array_split(x[1:], 20)), of_matmul(x[:1]))


def grid_of(weight: np.ndarray, bits: int = 8, signed: bool = True) -> Grid:
    largest = np.abs(weight).max(1)
    return grid_between(-largest, largest, bits=bits, signed=signed, narrow=signed, axis=0)


def error(weight: np.ndarray, integers: np.ndarray, grid: Grid, moments: Moments) -> np.ndarray:
    return moments.mean_square_change(from_integers(integers, grid) - weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_together_is_better_on_the_inputs_and_on_others_like_them(bits: int) -> None:
    weight = np.random.default_rng(1).standard_normal((24, 48)) / 10
    x = inputs(4000, 48)
    seen, unseen = moments_of(x[:2000]), moments_of(x[2000:])
    grid = grid_of(weight, bits)
    nearest, chosen = to_integers(weight, grid), adaround(weight, grid, seen)
    for moments in (seen, unseen):
        assert error(weight, chosen, grid, moments).sum() < LEFT * error(weight, nearest, grid, moments).sum()
    assert np.array_equal(chosen, adaround(weight, grid, seen)), "it is deterministic"


@given(
    groups=st.integers(1, 3),
    rows=st.integers(1, 4),
    size=st.integers(1, 9),
    signed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_no_row_is_worse_and_every_integer_a_neighbour(
    groups: int, rows: int, size: int, signed: bool, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    weight = generator.standard_normal((groups * rows, size))
    x = generator.standard_normal((1, groups * size, 30)) + 1
    moments = of_conv(x, [1], [1], [0, 0], [1], groups)
    grid = grid_of(weight, 5, signed)
    nearest, chosen = to_integers(weight, grid), adaround(weight, grid, moments)
    assert chosen.dtype == nearest.dtype
    assert (np.abs(from_integers(chosen, grid) - weight) < grid.scale[:, None] * (1 + TOLERANCE)).all()
    before, after = error(weight, nearest, grid, moments), error(weight, chosen, grid, moments)
    assert (after <= before * (1 + TOLERANCE)).all()


def test_three_weights_get_the_best_of_all_choices() -> None:
    """Equal inputs: what counts is the sum of the errors, and 0.4 + 0.4 + 0.4 is next to 1."""
    moments = of_matmul(np.ones((4, 3)))
    grid = Grid(np.float32(1), np.int32(0), -8, 7)
    assert adaround(np.full((1, 3), 0.4), grid, moments).sum() == 1
    assert to_integers(np.full((1, 3), 0.4), grid).sum() == 0


def test_weights_beyond_the_grid_stay_at_its_end() -> None:
    weight = np.array([[100.0, -100.0, 0.3, 0.3]])
    chosen = adaround(weight, Grid(np.float32(1), np.int32(0), -8, 7), of_matmul(np.ones((2, 4))))
    assert chosen[0, :2].tolist() == [7, -8]


def test_every_weight_may_have_its_own_scale() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 8))
    blocks = np.abs(weight).reshape(4, 2, 4).max(2).repeat(4, axis=1).astype(np.float32) / 7
    grid = Grid(blocks, np.zeros_like(blocks, np.int32), -8, 7)
    moments = moments_of(inputs(400, 8))
    chosen = adaround(weight, grid, moments)
    assert error(weight, chosen, grid, moments).sum() < error(weight, to_integers(weight, grid), grid, moments).sum()


@pytest.mark.parametrize("dead", [[0], [0, 1, 2]])
def test_inputs_that_are_always_zero_do_no_harm(dead: list[int]) -> None:
    weight = np.random.default_rng(0).standard_normal((2, 3))
    x = inputs(50, 3)
    x[:, dead] = 0
    grid = grid_of(weight)
    chosen = adaround(weight, grid, moments_of(x))
    assert (np.abs(from_integers(chosen, grid) - weight) < grid.scale[:, None]).all()


def test_a_search_that_only_made_things_worse_would_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((4, 6))
    grid = grid_of(weight)
    monkeypatch.setattr(rounding, "_descended", lambda chosen, rows, second: rows[1])  # all of them down
    chosen = adaround(weight, grid, moments_of(inputs(100, 6)))
    assert np.array_equal(chosen, to_integers(weight, grid))


@pytest.mark.parametrize("groups", [1, 2])
def test_a_corrected_bias_keeps_the_mean_output(groups: int) -> None:
    x = inputs(50, 8)
    weight = np.random.default_rng(1).standard_normal((6, 8 // groups))
    simulated = from_integers(to_integers(weight, grid_of(weight, 3)), grid_of(weight, 3))
    correction = bias_correction(weight, simulated, of_conv(x.T[None], [1], [1], [0, 0], [1], groups))

    def mean_output(rows: np.ndarray) -> np.ndarray:
        parts = zip(np.split(x, groups, axis=1), np.split(rows, groups), strict=True)
        return np.concatenate([(part @ own.T).mean(0) for part, own in parts])

    off = np.abs(mean_output(simulated) - mean_output(weight)).max()
    left = np.abs(mean_output(simulated) + correction - mean_output(weight)).max()
    assert left < TOLERANCE < off
