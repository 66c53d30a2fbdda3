import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from mobilemix.quantization import moments
from mobilemix.quantization.moments import Moments, of_conv, of_matmul

TOLERANCE = 1e-12


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) + 0.5


@given(
    groups=st.integers(1, 3),
    rank=st.integers(1, 2),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    before=st.integers(0, 2),
    after=st.integers(0, 2),
    batch=st.integers(1, 2),
)
@settings(max_examples=40, deadline=None)
def test_moments_of_a_convolution_tell_what_its_weights_do(
    groups: int, rank: int, kernel: int, stride: int, dilation: int, before: int, after: int, batch: int
) -> None:
    x = gaussian(batch, 2 * groups, *[6, 7][:rank])
    weight = gaussian(3 * groups, 2, *[kernel] * rank, seed=1)
    found = of_conv(x, [kernel] * rank, [stride] * rank, [before] * rank + [after] * rank, [dilation] * rank, groups)
    padded = F.pad(torch.from_numpy(x).double(), [before, after] * rank)
    convolve = F.conv1d if rank == 1 else F.conv2d
    output = convolve(padded, torch.from_numpy(weight).double(), stride=stride, dilation=dilation, groups=groups)
    rows = weight.reshape(len(weight), -1)
    by_channel = output.movedim(1, 0).flatten(1)
    assume(by_channel.shape[1] <= moments.POSITIONS)  # of more, some are looked at, and nothing is equal
    assert found.count == by_channel.shape[1]
    np.testing.assert_allclose(found.mean_change(rows), by_channel.mean(1), rtol=TOLERANCE, atol=TOLERANCE)
    squares = by_channel.square().mean(1)
    np.testing.assert_allclose(found.mean_square_change(rows), squares, rtol=TOLERANCE, atol=TOLERANCE)


def test_moments_of_a_matrix_product() -> None:
    x, weight = gaussian(2, 5, 4), gaussian(3, 4, seed=1)
    output = x.reshape(-1, 4).astype(np.float64) @ weight.T
    found = of_matmul(x)
    np.testing.assert_allclose(found.mean_change(weight), output.mean(0), rtol=TOLERANCE)
    np.testing.assert_allclose(found.mean_square_change(weight), np.square(output).mean(0), rtol=TOLERANCE)


def test_moments_of_samples_add_up() -> None:
    parts = gaussian(3, 4), gaussian(8, 4, seed=1)
    found, whole = of_matmul(parts[0]) + of_matmul(parts[1]), of_matmul(np.concatenate(parts))
    np.testing.assert_allclose(found.mean, whole.mean, rtol=TOLERANCE)
    np.testing.assert_allclose(found.second, whole.second, rtol=TOLERANCE)
    assert found.count == whole.count


def test_of_a_large_value_some_positions_are_looked_at() -> None:
    x = gaussian(1, 2, 64, 64)

    def look(seed: int) -> Moments:
        return of_conv(x, [1, 1], [1, 1], [0] * 4, [1, 1], seed=seed)

    one, same, other = look(0), look(0), look(1)
    assert one.count == moments.POSITIONS
    assert np.array_equal(one.second, same.second)
    assert not np.array_equal(one.second, other.second)
    standard_error = x.std() / np.sqrt(moments.POSITIONS)
    assert np.abs(one.mean[0] - x.mean((0, 2, 3))).max() < 5 * standard_error


def test_the_order_is_that_of_the_weights() -> None:
    x = np.zeros((1, 2, 2, 2), np.float32)
    x[0, 1, 1, 0] = 1.0
    found = of_conv(x, [2, 2], [1, 1], [0] * 4, [1, 1])
    assert found.mean.tolist() == [[0, 0, 0, 0, 0, 0, 1, 0]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_wide(dtype: type) -> None:
    found = of_matmul(np.array([[1e6], [1.0]], dtype))
    assert found.second.dtype == np.float64
    assert found.second[0, 0, 0] == (1e12 + 1) / 2
