"""A small network with everything that verification has to see, lowered for the Core ML target."""

import dataclasses
from typing import Any

import numpy as np
import torch
from coreml_packages import seeded
from torch import nn
from torch.nn import functional as F

from mobilemix.capture import capture
from mobilemix.passes import lower
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Inputs, Lowered

SIZE = 16
CLASSES = 5
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
LABELS = ("daisy", "dandelion", "rose", "sunflower", "tulip")
FP32 = Recipe(precision="fp32", input="tensor")
FP16 = Recipe(precision="fp16", input="tensor")
IMAGE = Recipe(precision="fp16", input="image")


class Mixer(nn.Module):
    """Convolution, batch norm, exact GELU, a filter in the frequency domain, attention over a split, layer norm."""

    def __init__(self, channels: int = 3, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.GELU())
        self.filter = nn.Parameter(torch.ones(width, SIZE // 2, SIZE // 4 + 1, 2))
        self.norm = nn.LayerNorm(width, eps=1e-3)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.stem(image)
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
        x = x + torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")
        x = self.norm(x.flatten(2).transpose(1, 2))
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        x = x + torch.softmax(query @ key.transpose(1, 2), dim=-1) @ value
        return self.head(F.gelu(x).mean(1))


def lowered(module: nn.Module | None = None, shape: tuple[int, ...] = (1, 3, SIZE, SIZE), **changes: Any) -> Lowered:
    """`module` (a seeded `Mixer` by default) captured and rewritten, with no labels unless `changes` say otherwise."""
    program = lower(capture(module or seeded(Mixer()), (torch.zeros(shape),)))
    made = Lowered("mixer", program, ("image",), ("logits",), MEAN, STD, None, {"author": "mobilemix"})
    return dataclasses.replace(made, **changes)


def samples(count: int = 1, shape: tuple[int, ...] = (1, 3, SIZE, SIZE)) -> list[Inputs]:
    """Normalised noise."""
    generator = np.random.default_rng(0)
    return [{"image": generator.standard_normal(shape, dtype=np.float32)} for _ in range(count)]
