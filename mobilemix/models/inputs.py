"""The check of an input image that the backbones share."""

from torch import Tensor

from mobilemix.errors import InputError


def check_image(x: Tensor, in_channels: int) -> None:
    """Checks that `x` is (B, in_channels, H, W) with at least one pixel.

    Raises:
        InputError: it is not.
    """
    if x.ndim != 4 or x.shape[1] != in_channels or x.shape[2] < 1 or x.shape[3] < 1:
        shape = ", ".join(map(str, x.shape))
        raise InputError(f"expected an image (batch, {in_channels}, height, width) of one pixel or more, got ({shape})")
