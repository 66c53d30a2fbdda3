import numpy as np
import pytest

from mobilemix.quantization.moments import of_conv
from mobilemix.targets.coreml.weights import Integers, Palettes, bits_of, compress, half_up

HALF = 2.0**-10
"""Relative: of rounding a weight's form to float16."""


def weight(*shape: int) -> np.ndarray:
    generator = np.random.default_rng(sum(shape))
    spread = generator.uniform(0.01, 3, (shape[0], *[1] * (len(shape) - 1)))
    return (generator.standard_normal(shape) * spread).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("shape", [(24, 16, 3, 3), (40, 1, 3, 3), (12, 64)])
def test_eight_bits_have_a_scale_for_each_channel(shape: tuple[int, ...]) -> None:
    values = weight(*shape)
    form = compress(values, "w8", 16)
    assert isinstance(form, Integers)
    assert (form.data.dtype, form.scale.dtype) == (np.int8, np.float16)
    assert form.scale.shape == (shape[0], *[1] * (len(shape) - 1))
    assert np.abs(form.data).reshape(shape[0], -1).max(1).min() >= 126, "each channel spans the integers"
    assert form.data.min() >= -127
    assert np.all(np.abs(form.dense - values) <= form.scale / 2 + HALF * np.abs(values))


@pytest.mark.parametrize(("inputs", "block"), [(96, 32), (48, 16), (40, 8)])
def test_four_bits_have_a_scale_for_each_block(inputs: int, block: int) -> None:
    values = weight(24, inputs, 1, 1)
    form = compress(values, "w4", 18)
    assert isinstance(form, Integers)
    assert form.scale.shape == (24, inputs // block, 1, 1)
    assert (int(form.data.min()), int(form.data.max())) == (-7, 7)
    step = np.repeat(form.scale.astype(np.float32), block, 1)
    assert np.all(np.abs(form.dense - values) <= step / 2 + HALF * np.abs(values))


@pytest.mark.parametrize(
    ("precision", "shape"),
    [("w4", (24, 1, 3, 3)), ("w4", (24, 36, 1, 1)), ("palette6", (24, 3, 3, 3)), ("palette4", (24, 16, 1, 1))],
)
def test_without_a_block_or_with_few_weights_a_row_there_are_eight_bits(precision: str, shape: tuple[int, ...]) -> None:
    form = compress(weight(*shape), precision, 18)
    assert form.bits == bits_of(precision, shape) == 8
    np.testing.assert_array_equal(form.dense, compress(weight(*shape), "w8", 18).dense)


@pytest.mark.parametrize(
    ("precision", "ios", "groups"), [("palette4", 16, 1), ("palette4", 18, 3), ("palette8", 18, 1)]
)
def test_palettes_are_for_groups_of_channels_where_ios_has_them(precision: str, ios: int, groups: int) -> None:
    values = weight(48, 64, 1, 1)
    form = compress(values, precision, ios)
    assert isinstance(form, Palettes)
    assert form.entries.shape == (groups, 1 << form.bits)
    assert form.tables.shape == (groups, 1, 1, 1, 1 << form.bits, 1)
    for rows, own, entries in zip(np.split(form.dense, groups), np.split(values, groups), form.entries, strict=True):
        assert np.isin(rows, entries.astype(np.float32)).all()
        distances = np.abs(own[..., None] - entries.astype(np.float64))
        np.testing.assert_allclose(np.abs(rows - own), distances.min(-1), rtol=0, atol=1e-7)


def test_a_smaller_palette_is_smaller_and_noisier() -> None:
    values = weight(64, 64, 1, 1)
    noise = [
        np.square(compress(values, name, 18).dense - values).mean() for name in ("palette8", "palette6", "palette4")
    ]
    assert noise[0] < noise[1] / 4 < noise[2] / 16


def test_channels_of_zeros_stay_zeros() -> None:
    values = weight(16, 32, 1, 1)
    values[3] = 0
    for precision in ("w8", "w4", "palette6"):
        form = compress(values, precision, 18)
        assert not np.isnan(form.dense).any()
        assert np.abs(form.dense[3]).max() <= np.abs(form.dense).max() * 0.02
    assert not compress(values, "w4", 18).dense[3].any()


def test_scales_are_never_rounded_down() -> None:
    scales = np.random.default_rng(0).uniform(1e-6, 3, 1000).astype(np.float32)
    assert np.all(half_up(scales) >= scales)
    assert np.all(half_up(scales) <= scales * (1 + 2.0**-9) + 2.0**-24)


def test_rounding_together_changes_the_output_less_than_each_to_the_nearest() -> None:
    values = weight(16, 32, 1, 1)
    x = np.random.default_rng(0).standard_normal((1, 4, 12, 12)).repeat(8, 1).astype(np.float32)
    x += 0.1 * np.random.default_rng(1).standard_normal(x.shape).astype(np.float32)
    moments = of_conv(x, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    together, alone = compress(values, "w4", 18, moments), compress(values, "w4", 18)

    def change(dense: np.ndarray) -> float:
        return float(moments.mean_square_change((dense - values).reshape(16, -1)).sum())

    assert change(together.dense) < 0.7 * change(alone.dense)
    assert isinstance(together, Integers)
    step = np.repeat(together.scale.astype(np.float32), 32, 1)
    assert np.all(np.abs(together.dense - values) <= step + HALF * np.abs(values))
