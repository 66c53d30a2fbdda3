"""A small network with a layer of every kind that compression knows: rounded, in fewer bits, and left alone."""

from typing import Any

import coreml_lowered
import numpy as np
import torch
from coreml_packages import seeded
from torch import nn

from mobilemix.targets.base import Inputs, Lowered

WIDTH = 32


class Compressible(nn.Module):
    """Stem, depthwise and pointwise convolutions, a gate computed from a spectrum, a norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH), nn.GELU())
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.expand = nn.Conv2d(WIDTH, 2 * WIDTH, 1)
        self.reduce = nn.Conv2d(2 * WIDTH, WIDTH, 1)
        self.gate = nn.Conv2d(2 * WIDTH, WIDTH, 1)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        x = x + self.reduce(nn.functional.silu(self.expand(self.depthwise(x))))
        spectrum = torch.fft.rfft2(x, norm="ortho")
        gate = torch.sigmoid(self.gate(torch.cat([spectrum.real, spectrum.imag], 1)))
        x = x + torch.fft.irfft2(spectrum * gate, s=x.shape[-2:], norm="ortho")
        return self.head(self.norm(x.mean((2, 3))))


def lowered(**changes: Any) -> Lowered:
    """The network, captured and rewritten."""
    return coreml_lowered.lowered(seeded(Compressible()), **changes)


def samples(count: int = 1) -> list[Inputs]:
    """Smooth pictures, normalised: what ranges that photographs have are good for."""
    generator = np.random.default_rng(1)
    axis = np.arange(coreml_lowered.SIZE) / coreml_lowered.SIZE
    made = []
    for _ in range(count):
        phases, rates = generator.uniform(0, 6, (3, 1, 1)), generator.uniform(1, 9, (3, 1, 1))
        waves = np.sin(phases + rates * axis[:, None] + rates[::-1] * axis)
        made.append({"image": waves[None].astype(np.float32)})
    return made
