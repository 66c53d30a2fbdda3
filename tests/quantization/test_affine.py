import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.ao.quantization.observer import MinMaxObserver

from mobilemix.quantization.affine import Grid, from_integers, grid_between, to_integers

HALF = 0.5 + 1e-3
"""Steps between a number and the one that stands for it, and what float32 adds to it."""

numbers = st.floats(-1e6, 1e6, width=32)
arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=numbers)
kinds = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([4, 7, 8]),
        "signed": st.booleans(),
        "symmetric": st.booleans(),
        "narrow": st.booleans(),
    }
)

often = settings(max_examples=100, deadline=None)


def over(values: np.ndarray, kind: dict) -> Grid:
    return grid_between(float(values.min()), float(values.max()), **kind)


def representable(values: np.ndarray) -> np.ndarray:
    """Values, those below a millionth of the largest as 0: a range of denormals has no scale in float32."""
    return np.where(np.abs(values) < 1e-30, np.float32(0), values)


@often
@given(arrays, kinds)
def test_numbers_in_the_range_move_half_a_step_at_most(values: np.ndarray, kind: dict) -> None:
    values = representable(values)
    grid = over(values, kind)
    moved = np.abs(from_integers(to_integers(values, grid), grid) - values.astype(np.float64))
    assert moved.max() <= HALF * grid.scale


@often
@given(arrays, kinds)
def test_integers_are_those_of_what_they_stand_for(values: np.ndarray, kind: dict) -> None:
    grid = over(representable(values), kind)
    integers = to_integers(values, grid)
    np.testing.assert_array_equal(to_integers(from_integers(integers, grid), grid), integers)


@often
@given(arrays, kinds)
def test_integers_fit_their_type_and_zero_is_exact(values: np.ndarray, kind: dict) -> None:
    grid = over(values, kind)
    integers = to_integers(values, grid)
    assert integers.dtype == grid.dtype == (np.int8 if kind["signed"] else np.uint8)
    assert grid.low <= integers.min() <= integers.max() <= grid.high
    assert grid.high - grid.low == 2 ** kind["bits"] - 1 - kind["narrow"]
    zero = np.zeros(1, np.float32)
    assert from_integers(to_integers(zero, grid), grid) == 0
    assert grid.low <= grid.zero_point <= grid.high


@often
@given(arrays, kinds)
def test_larger_numbers_have_larger_integers(values: np.ndarray, kind: dict) -> None:
    ordered = np.sort(values.ravel())
    assert (np.diff(to_integers(ordered, over(values, kind)).astype(int)) >= 0).all()


def test_numbers_beyond_the_range_are_clipped() -> None:
    grid = grid_between(-1.0, 1.0, narrow=True)
    assert to_integers(np.float32([-5, -1, 0, 1, 5]), grid).tolist() == [-127, -127, 0, 127, 127]


@pytest.mark.parametrize(
    ("kind", "low", "high", "zero"),
    [
        ({}, -128, 127, 0),
        ({"narrow": True}, -127, 127, 0),
        ({"bits": 7}, -64, 63, 0),
        ({"bits": 4}, -8, 7, 0),
        ({"signed": False}, 0, 255, 128),
        ({"signed": False, "symmetric": False}, 0, 255, 64),
        ({"symmetric": False}, -128, 127, -64),
    ],
)
def test_kinds(kind: dict, low: int, high: int, zero: int) -> None:
    grid = grid_between(-1.0, 3.0, **kind)
    assert (grid.low, grid.high, int(grid.zero_point)) == (low, high, zero)


def test_a_range_without_zero_is_widened_to_it() -> None:
    grid = grid_between(2.0, 5.1, signed=False, symmetric=False)
    assert (float(grid.scale), int(grid.zero_point)) == (pytest.approx(5.1 / 255), 0)
    grid = grid_between(-5.1, -2.0, signed=False, symmetric=False)
    assert (float(grid.scale), int(grid.zero_point)) == (pytest.approx(5.1 / 255), 255)


def test_nothing_but_zeros_has_a_scale() -> None:
    grid = grid_between(0.0, 0.0)
    assert grid.scale == 1
    assert to_integers(np.zeros(3, np.float32), grid).tolist() == [0, 0, 0]


@pytest.mark.parametrize("symmetric", [True, False])
def test_channels_have_scales_of_their_own(symmetric: bool) -> None:
    weight = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32) * np.float32(
        [[[1]], [[10]], [[100]]]
    )
    grid = grid_between(weight.min((1, 2)), weight.max((1, 2)), symmetric=symmetric, axis=0)
    integers = to_integers(weight, grid)
    assert grid.scale.shape == grid.zero_point.shape == (3,)
    for index, channel in enumerate(weight):
        own = grid_between(channel.min(), channel.max(), symmetric=symmetric)
        np.testing.assert_array_equal(integers[index], to_integers(channel, own))
        np.testing.assert_array_equal(from_integers(integers, grid)[index], from_integers(integers[index], own))


@pytest.mark.parametrize("symmetric", [True, False])
@often
@given(arrays)
def test_scales_and_zero_points_are_those_of_torch(symmetric: bool, values: np.ndarray) -> None:
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    observer = MinMaxObserver(dtype=torch.qint8 if symmetric else torch.quint8, qscheme=scheme, eps=1e-30)
    values = representable(values)
    observer(torch.from_numpy(values))
    scale, zero_point = observer.calculate_qparams()
    if not values.any():
        return
    grid = over(values, {"signed": symmetric, "symmetric": symmetric})
    # torch spreads the symmetric range over 127.5 steps, of which one end has half too few.
    assert float(grid.scale) == pytest.approx(float(scale) * (127.5 / 127 if symmetric else 1), rel=1e-5)
    assert abs(int(grid.zero_point) - int(zero_point)) <= 1
    if not symmetric:
        ours = from_integers(to_integers(values, grid), grid)
        theirs = torch.fake_quantize_per_tensor_affine(torch.from_numpy(values), scale, zero_point, 0, 255).numpy()
        assert np.abs(ours - theirs).max() <= (1 + 1e-3) * grid.scale
