"""From an image file to the tensor that a classifier takes: one definition for verification, examples and apps."""

import dataclasses
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from mobilemix.errors import InputError


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
            InputError: the file is missing or is not an image that Pillow reads.
        """
        try:
            with Image.open(path) as file:
                # EXIF orientation first: phones store photographs lying on their side.
                image = ImageOps.exif_transpose(file).convert("L" if len(self.mean) == 1 else "RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"cannot read the image {path}: {error}") from error
        scale = max(self.height / image.height, self.width / image.width) / self.crop_pct
        size = (max(self.width, round(image.width * scale)), max(self.height, round(image.height * scale)))
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
