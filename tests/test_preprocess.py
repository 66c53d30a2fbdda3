import numpy as np
import pytest
from PIL import Image

from mobilemix.errors import InputError
from mobilemix.preprocess import Preprocess

PLAIN = Preprocess(8, 8, (0.0,) * 3, (1.0,) * 3, crop_pct=1.0)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_an_image_of_the_right_size_passes_through_untouched(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    result = PLAIN(save(tmp_path / "a.png", array))
    assert result.shape == (1, 3, 8, 8)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0].transpose(1, 2, 0) * 255, array, atol=1e-4)


def test_normalisation_is_per_channel(tmp_path):
    array = np.full((8, 8, 3), (0, 51, 255), np.uint8)
    result = Preprocess(8, 8, (0.5, 0.2, 0.0), (0.5, 1.0, 2.0), 1.0)(save(tmp_path / "a.png", array))
    np.testing.assert_allclose(result[0, :, 0, 0], (-1.0, 0.0, 0.5), atol=1e-7)


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (7, 100), (8, 8)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.95, 0.875])
def test_any_size_gives_a_centred_crop(tmp_path, size, crop_pct):
    width, height = size
    array = np.zeros((height, width, 3), np.uint8)
    array[:, width // 2 :] = 255  # dark left, light right: the crop's own halves must be the same
    result = Preprocess(16, 16, (0.0,) * 3, (1.0,) * 3, crop_pct).pixels(save(tmp_path / "a.png", array))
    assert result.shape == (16, 16, 3)
    assert result[:, 0].mean() < 64 < 192 < result[:, -1].mean()


def test_exif_orientation_is_applied(tmp_path):
    array = np.zeros((8, 8, 3), np.uint8)
    array[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    upright = PLAIN.pixels(save(tmp_path / "a.jpg", array, exif=exif, quality=95))
    assert upright[0].mean() < 20 < 230 < upright[-1].mean()


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "1"])
def test_every_colour_mode_is_read(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (9, 9), (200, 200, 200)).convert(mode).save(path)
    assert PLAIN.pixels(path).shape == (8, 8, 3)


def test_one_channel_reads_grayscale(tmp_path):
    path = save(tmp_path / "a.png", np.full((8, 8, 3), 128, np.uint8))
    assert Preprocess(8, 8, (0.5,), (0.5,), 1.0)(path).shape == (1, 1, 8, 8)


def test_what_is_no_image_is_one_clear_error(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    for name in ("a.jpg", "missing.jpg"):
        with pytest.raises(InputError, match=name):
            PLAIN(tmp_path / name)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled_to_8(tmp_path, suffix, channels):
    path = tmp_path / f"a.{suffix}"
    levels = np.tile(np.array([0, 255, 256, 32768, 65407, 65535], np.uint16), (6, 1))
    if suffix == "pgm":
        path.write_bytes(b"P5 6 6 65535\n" + levels.astype(">u2").tobytes())
    else:
        Image.fromarray(levels).save(path)
    pixels = Preprocess(6, 6, (0.0,) * channels, (1.0,) * channels, 1.0).pixels(path)
    assert pixels.shape == (6, 6, channels)
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 1, 1, 128, 255, 255])


def test_of_an_animation_the_first_frame_counts(tmp_path):
    path = tmp_path / "a.gif"
    dark, light = (Image.new("L", (8, 8), level) for level in (10, 240))
    dark.save(path, save_all=True, append_images=[light])
    assert PLAIN.pixels(path).max() < 30


@pytest.mark.parametrize("size", [(20_000, 20_000), (1, 400_000)])
def test_pixels_beyond_any_photograph_are_refused_before_they_are_made(tmp_path, size):
    """A megabyte may claim any number; and what is one pixel wide would be enlarged to as many."""
    path = tmp_path / "a.png"
    Image.new("1", size).save(path)
    with pytest.raises(InputError, match=r"a\.png: .*pixels"):
        Preprocess(224, 224, (0.0,) * 3, (1.0,) * 3)(path)


def test_floats_without_a_scale_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.ones((8, 8), np.float32)).save(path)
    with pytest.raises(InputError, match="what white is"):
        PLAIN(path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # decoders say what they stumble over
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp", "ppm"])
def test_broken_files_are_an_error_of_one_line_or_still_an_image(tmp_path, suffix):
    generator = np.random.default_rng(0)
    whole = save(tmp_path / f"whole.{suffix}", generator.integers(0, 256, (24, 20, 3), dtype=np.uint8)).read_bytes()
    path = tmp_path / f"a.{suffix}"
    messages = []
    for trial in range(60):
        content = bytearray(whole[: generator.integers(len(whole))] if trial % 2 else whole)
        for place in generator.integers(0, len(content), 8) if content else ():
            content[place] = generator.integers(256)
        path.write_bytes(content)
        try:
            assert PLAIN(path).shape == (1, 3, 8, 8)
        except InputError as error:
            messages.append(str(error))
    assert messages
    assert not any("\n" in message for message in messages)
