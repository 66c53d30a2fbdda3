import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mobilemix.targets.coreml.palette import nearest, palette

GAUSSIAN_DB = {16: 20.2, 64: 31.9}
"""Signal over noise of the best quantiser with so many levels of a normal variable (Max, 1960)."""
TOLERANCE_DB = 0.3

weights = arrays.arrays(np.float32, st.integers(1, 300), elements=st.floats(-8, 8, width=16))


def noise(values: np.ndarray, entries: np.ndarray) -> float:
    return float(np.square(entries[nearest(values, entries)].astype(np.float64) - values).mean())


@given(weights, st.sampled_from([2, 16, 64, 256]))
@settings(max_examples=25, deadline=None)
def test_indices_are_of_the_nearest_entries(values: np.ndarray, size: int) -> None:
    entries = palette(values, size)
    assert (entries.shape, entries.dtype) == ((size,), np.float16)
    assert np.all(np.diff(entries.astype(np.float64)) >= 0)
    distances = np.abs(values[:, None] - entries.astype(np.float64))
    found = np.take_along_axis(distances, nearest(values, entries)[:, None].astype(np.int64), 1)[:, 0]
    np.testing.assert_array_equal(found, distances.min(1))


@given(weights)
@settings(max_examples=25, deadline=None)
def test_few_different_weights_are_all_in_the_palette(values: np.ndarray) -> None:
    few = values[np.arange(values.size) % 16]
    assert noise(few, palette(few, 16)) == 0


@pytest.mark.parametrize("size", sorted(GAUSSIAN_DB))
def test_normal_weights_have_the_noise_that_theory_has(size: int) -> None:
    values = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    found = -10 * np.log10(noise(values, palette(values, size)))
    assert found == pytest.approx(GAUSSIAN_DB[size], abs=TOLERANCE_DB)


def test_it_is_better_than_even_steps_on_heavy_tails() -> None:
    values = np.random.default_rng(0).standard_t(3, 5000).astype(np.float32)
    even = np.linspace(values.min(), values.max(), 16).astype(np.float16)
    assert noise(values, palette(values, 16)) < 0.25 * noise(values, even)


def test_the_order_of_weights_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    values = generator.standard_normal(1000).astype(np.float32)
    assert palette(values, 16).tobytes() == palette(generator.permutation(values), 16).tobytes()
