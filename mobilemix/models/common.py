"""What the backbones share."""

import torch
from torch import Tensor, nn

from mobilemix.errors import InputError

HEAD_INIT_STD = 0.02
CHANNEL_NORM_EPS = 1e-5


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (B, C, ...), with `dims` dimensions in all."""

    def __init__(self, channels: int, dims: int):
        super().__init__()
        shape = (1, channels) + (1,) * (dims - 2)
        self.weight = nn.Parameter(torch.ones(shape))
        self.bias = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(1, keepdim=True) + CHANNEL_NORM_EPS)
        return centred * scale * self.weight + self.bias


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
