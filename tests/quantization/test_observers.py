import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnxruntime.quantization.calibrate import HistogramCollector
from torch.ao.quantization.observer import MinMaxObserver, MovingAverageMinMaxObserver

from mobilemix.errors import InputError
from mobilemix.quantization.affine import from_integers, grid_between, to_integers
from mobilemix.quantization.observers import BINS, LEVELS, MOMENTUM, OBSERVERS, TAIL, MinMax, show

BIN = 2e-3
"""Relative width of a histogram's bin."""
LEAST = 1e-8
"""The end of a histogram's first bin, or more."""
CLIPPING = ("percentile", "entropy", "mse")

arrays = hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=6), elements=st.floats(-1e4, 1e4, width=32))
samples = st.lists(arrays, min_size=1, max_size=4)
often = settings(max_examples=60, deadline=None)


def observe(name: str, values: list[np.ndarray], symmetric: bool = False) -> tuple[float, float]:
    observer = OBSERVERS[name]()
    for value in values:
        observer.observe(value)
    return observer.range(symmetric)


def draw(kind: str, count: int = 6, size: int = 15_000) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    draws = {
        "normal": lambda: generator.standard_normal(size),
        "laplace": lambda: generator.laplace(size=size),
        "relu": lambda: np.maximum(generator.standard_normal(size), 0),
        "long-tailed": lambda: generator.standard_t(3, size),
    }
    return [draws[kind]().astype(np.float32) for _ in range(count)]


def error(values: list[np.ndarray], ends: tuple[float, float], symmetric: bool) -> float:
    grid = grid_between(*ends, signed=symmetric, symmetric=symmetric, narrow=symmetric)
    return sum(float(np.square(from_integers(to_integers(x, grid), grid) - x.astype(np.float64)).sum()) for x in values)


@pytest.mark.parametrize("name", OBSERVERS)
@often
@given(values=samples, symmetric=st.booleans())
def test_ranges_hold_zero_and_no_more_than_was_seen(name: str, values: list[np.ndarray], symmetric: bool) -> None:
    low, high = observe(name, values, symmetric)
    least, most = (min(0, *(float(x.min()) for x in values)), max(0, *(float(x.max()) for x in values)))
    if symmetric:
        assert low == -high
        least, most = min(least, -most), max(most, -least)
    slack = BIN * max(-least, most) + 1e-6
    assert least - slack <= low <= 0 <= high <= most + slack


@pytest.mark.parametrize("name", ["min-max", *CLIPPING])
@often
@given(values=samples)
def test_order_is_of_no_account(name: str, values: list[np.ndarray]) -> None:
    assert observe(name, values) == observe(name, values[::-1])


@often
@given(samples)
def test_min_max_clips_nothing(values: list[np.ndarray]) -> None:
    low, high = observe("min-max", values)
    assert low == min(0, *(float(x.min()) for x in values))
    assert high == max(0, *(float(x.max()) for x in values))
    observer = MinMaxObserver()
    for value in values:
        observer(torch.from_numpy(value))
    assert low == min(0, observer.min_val.item())
    assert high == max(0, observer.max_val.item())


def test_moving_average_is_that_of_torch() -> None:
    values = draw("long-tailed")
    observer = MovingAverageMinMaxObserver(averaging_constant=1 - MOMENTUM)
    for value in values:
        observer(torch.from_numpy(value))
    expected = observer.min_val.item(), observer.max_val.item()
    assert observe("moving-average", values) == pytest.approx(expected, rel=1e-5)


def test_moving_average_follows_what_comes_last() -> None:
    small, large = np.float32([-1, 1]), np.float32([-9, 9])
    assert observe("moving-average", [small, large])[1] == pytest.approx(MOMENTUM + 9 * (1 - MOMENTUM))
    assert observe("moving-average", [large, small])[1] == pytest.approx(9 * MOMENTUM + 1 - MOMENTUM)


@pytest.mark.parametrize("name", CLIPPING)
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_outlier_is_clipped(name: str, symmetric: bool) -> None:
    values = draw("normal", count=20)
    values[2][7] = 12.0
    low, high = observe(name, values, symmetric)
    assert 2.5 < high < 11
    assert low == -high if symmetric else -6 < low < -2.5


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "long-tailed"])
def test_squared_error_is_least(kind: str, symmetric: bool) -> None:
    values = draw(kind)
    least = error(values, observe("mse", values, symmetric), symmetric)
    for name in OBSERVERS:
        assert least <= 1.01 * error(values, observe(name, values, symmetric), symmetric), name
    assert least < 0.95 * error(values, observe("min-max", values, symmetric), symmetric)


@often
@given(samples, st.booleans())
def test_squared_error_is_never_worse_than_of_the_whole_range(values: list[np.ndarray], symmetric: bool) -> None:
    ours, whole = (error(values, observe(name, values, symmetric), symmetric) for name in ("mse", "min-max"))
    span = max(float(np.abs(x).max()) for x in values)
    # Numbers are compared to the width of a bin; those in the first, which is from 0, to all of it.
    bins = sum(x.size for x in values) * ((BIN * span) ** 2 + LEAST**2)
    assert ours <= 1.05 * whole + bins


@pytest.mark.parametrize("kind", ["normal", "laplace", "long-tailed"])
def test_percentile_clips_its_share(kind: str) -> None:
    values = draw(kind, count=80)
    low, high = observe("percentile", values)
    every = np.concatenate(values)
    assert ((every < low) | (every > high)).mean() == pytest.approx(TAIL, rel=0.3)


def collected(method: str, values: list[np.ndarray]) -> float:
    """The symmetric threshold that ONNX Runtime's calibrator chooses."""
    bins = BINS if method == "entropy" else 8192
    with contextlib.redirect_stdout(io.StringIO()):
        collector = HistogramCollector(method, True, bins, LEVELS, 100 * (1 - TAIL), "same")
        collector.collect({"value": values})
        return float(collector.compute_collection_result()["value"][1])


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "long-tailed"])
def test_percentile_is_near_that_of_onnx_runtime(kind: str) -> None:
    """Which takes the share of each end, so that a few numbers of the tail lie between."""
    values = draw(kind)
    assert observe("percentile", values, True)[1] == pytest.approx(collected("percentile", values), rel=0.15)


@pytest.mark.parametrize("kind", ["normal", "laplace", "relu", "long-tailed"])
def test_entropy_is_near_that_of_onnx_runtime(kind: str) -> None:
    """Which has half as many bins for each sign, and counts zeros."""
    values = draw(kind)
    ours, theirs = observe("entropy", values, True)[1], collected("entropy", values)
    assert theirs / 1.6 < ours < 1.6 * theirs


def test_zeros_do_not_narrow_entropys_range() -> None:
    values = draw("relu")
    assert observe("entropy", values) == observe("entropy", [value[value > 0] for value in values])


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("scale", [1e-7, 1e7])
def test_scale_is_of_no_account(name: str, scale: float) -> None:
    values = draw("laplace")
    expected = np.multiply(observe(name, values), scale)
    found = observe(name, [value * np.float32(scale) for value in values])
    np.testing.assert_allclose(found, expected, rtol=0.1)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_zeros_and_nothing_have_an_empty_range(name: str, symmetric: bool) -> None:
    assert observe(name, [], symmetric) == (0, 0)
    assert observe(name, [np.zeros((2, 3), np.float32)], symmetric) == (0, 0)
    assert observe(name, [np.zeros((0, 3), np.float32)], symmetric) == (0, 0)


@pytest.mark.parametrize("wrong", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_has_no_range(wrong):
    with pytest.raises(InputError, match="'x' is not finite"):
        show({"x": MinMax()}, "x", np.array([1.0, wrong], np.float32))
