"""Small modules that cover what the backbones are made of, and the means to compile and compare them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemix.recipe import Recipe
from mobilemix.targets.base import Lowered
from mobilemix.targets.onnx import OnnxTarget

ROUNDING = 1e-5
"""Relative L2 between ONNX Runtime and float64 PyTorch in float32."""


def lower(module: nn.Module, *inputs: Tensor, outputs: Sequence[str] = ("logits",), **fields: object) -> Lowered:
    """What the passes would hand over for a module that needs none of them."""
    program = torch.export.export(module.eval(), inputs, strict=False)
    described = {"name": "small", "mean": None, "std": None, "labels": None, "metadata": {}, **fields}
    return Lowered(
        program=program,
        input_names=tuple(program.graph_signature.user_inputs),
        output_names=tuple(outputs),
        **described,
    )


def expected(module: nn.Module, *inputs: Tensor) -> list[np.ndarray]:
    """Outputs in float64."""
    with torch.no_grad():
        outputs = module.eval().double()(*(value.double() for value in inputs))
    module.float()
    return [output.numpy() for output in (outputs if isinstance(outputs, tuple) else (outputs,))]


def randomise(module: nn.Module) -> nn.Module:
    """Leave no parameter at 1 or 0, where simplifications would remove what is to be tested."""
    generator = torch.Generator().manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.2, 1.0, generator=generator)
    return module


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (N, C, ...), written out."""

    def __init__(self, channels: int, dims: int = 4):
        super().__init__()
        shape = (channels, *(1 for _ in range(dims - 2)))
        self.weight, self.bias = nn.Parameter(torch.rand(shape) + 0.5), nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(1, keepdim=True)
        return centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + 1e-5) * self.weight + self.bias


class Attention(nn.Module):
    """Pre-norm attention over the pixels of (N, C, H, W), q, k and v from one linear map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(channels),
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(tokens)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return (tokens + self.out(mixed)).transpose(1, 2).unflatten(2, x.shape[2:])


class SpectralFilter(nn.Module):
    """A global filter with its transforms as real matrix products, as the passes leave them, and a softshrink."""

    def __init__(self, size: int):
        super().__init__()
        angles = 2 * torch.pi * torch.outer(torch.arange(size), torch.arange(size)) / size
        self.register_buffer("cosine", angles.cos() / size**0.5)
        self.register_buffer("sine", angles.sin() / size**0.5)

    def forward(self, x: Tensor) -> Tensor:
        real, imaginary = x @ self.cosine, x @ self.sine
        real, imaginary = (part - part.clamp(-0.01, 0.01) for part in (real, imaginary))
        return real @ self.cosine + imaginary @ self.sine


class SmallBackbone(nn.Module):
    """A little of everything: 3×16×16 to 5 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.SiLU())
        self.norm, self.group_norm = ChannelNorm(8), nn.GroupNorm(1, 8)
        self.attention, self.filter = Attention(8), SpectralFilter(8)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.scale = nn.Parameter(torch.full((8, 1, 1), 0.3))
        self.head = nn.Linear(8, 5)
        self.stem[1].running_mean.uniform_(-1, 1)
        self.stem[1].running_var.uniform_(0.5, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = x + self.scale * F.gelu(self.norm(x))
        x = self.attention(x)
        x = x + self.filter(self.group_norm(x))
        x = F.hardswish(x * self.squeeze(x))
        return self.head(x.mean((2, 3)))


def compile_backbone(path: Path) -> None:
    """Write a `SmallBackbone` with everything that a file can say about itself; the same weights every time."""
    torch.manual_seed(0)
    lowered = lower(
        SmallBackbone(),
        torch.randn(1, 3, 16, 16),
        name="blossom",
        mean=(0.5, 0.4, 0.3),
        std=(0.25, 0.25, 0.2),
        labels=("rosé", "tulip"),
        metadata={"author": "the authors", "description": "Five flowers."},
    )
    OnnxTarget().compile(lowered, Recipe(target="onnx"), path)
