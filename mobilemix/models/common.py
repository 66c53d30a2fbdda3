"""What the backbones share."""

from torch import Tensor, nn

from mobilemix.errors import InputError

HEAD_INIT_STD = 0.02


def check_image(x: Tensor, in_channels: int) -> None:
    """Checks that `x` is (B, in_channels, H, W) with at least one pixel.

    Raises:
        InputError: it is not.
    """
    if x.ndim != 4 or x.shape[1] != in_channels or x.shape[2] < 1 or x.shape[3] < 1:
        shape = ", ".join(map(str, x.shape))
        raise InputError(f"expected an image (batch, {in_channels}, height, width) of one pixel or more, got ({shape})")


def linear_head(channels: int, num_classes: int) -> nn.Linear:
    """A classifier (B, channels) to (B, num_classes) with small truncated-normal weights and no bias at first."""
    head = nn.Linear(channels, num_classes)
    nn.init.trunc_normal_(head.weight, std=HEAD_INIT_STD)
    nn.init.zeros_(head.bias)
    return head
