"""From an image file to the tensor that a classifier takes: one definition for verification, examples and apps."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mobilemix.errors import InputError, first_line

LARGEST_PIXELS = 100_000_000
"""Of an image as it is stored, or as resizing would leave it before the crop: a few kilobytes can claim any number."""


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """Resize the short side to round(size / crop_pct), centre-crop to size, scale to [0, 1], normalise.

    Attributes:
        height, width: of the result, in pixels.
        mean, std: per channel of [0, 1] values; one value reads the image as grayscale, three as RGB.
        crop_pct: share of the resized image that the crop keeps, along the side where it is tightest.
    """

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 0.95

    def pixels(self, path: Path) -> np.ndarray:
        """The cropped image as uint8, (height, width, channels).

        Raises:
            InputError: the file is missing, is not an image that Pillow reads, or has too many pixels.
        """
        try:
            with Image.open(path) as file:
                _refuse_above(file.width * file.height)
                # EXIF orientation first: phones store photographs lying on their side.
                image = _in_8_bits(ImageOps.exif_transpose(file)).convert("L" if len(self.mean) == 1 else "RGB")
            scale = max(self.height / image.height, self.width / image.width) / self.crop_pct
            size = (max(self.width, round(image.width * scale)), max(self.height, round(image.height * scale)))
            _refuse_above(size[0] * size[1])
        except Exception as error:  # on malformed files, decoders raise whatever they stumble over
            reason = getattr(error, "strerror", None) or first_line(error).replace(f" {str(path)!r}", "")
            raise InputError(f"cannot read the image {path}: {reason}") from error
        image = image.resize(size, Image.Resampling.BILINEAR)
        left, top = (size[0] - self.width) // 2, (size[1] - self.height) // 2
        cropped = image.crop((left, top, left + self.width, top + self.height))
        return np.asarray(cropped).reshape(self.height, self.width, len(self.mean))

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """(height, width, channels) in 0..255 to (1, channels, height, width), float32."""
        scaled = (pixels.astype(np.float64) / 255 - np.asarray(self.mean)) / np.asarray(self.std)
        return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None].astype(np.float32))

    def __call__(self, path: Path) -> np.ndarray:
        """Image file to (1, channels, height, width), float32, normalised; raises as `pixels` does."""
        return self.normalise(self.pixels(path))


def _refuse_above(pixels: int) -> None:
    if pixels > LARGEST_PIXELS:
        raise ValueError(f"{pixels:,} pixels are more than {LARGEST_PIXELS:,}")


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Modes of 16 bits scaled to 8, which Pillow would clip; it opens 16-bit PGM files as 32-bit "I"."""
    if image.mode == "F":
        raise ValueError("its pixels are floats, of which nothing says what white is")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.clip(np.asarray(image), 0, 65535) / 257 + 0.5).astype(np.uint8))
