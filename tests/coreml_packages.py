"""Small Core ML packages for the tests."""

from pathlib import Path
from typing import Any

import coremltools as ct
import torch
from torch import nn


class Tiny(nn.Module):
    """A classifier with the parts that every backbone has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.GELU())
        self.mix = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.expand = nn.Conv2d(16, 32, 1)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = nn.functional.silu(self.expand(x + self.mix(x)))
        return self.head(self.norm(x.mean((2, 3))))


def seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` in eval mode, every parameter and statistic away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, values in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("running_var"):
                values.uniform_(0.5, 2, generator=generator)
            elif values.is_floating_point():
                values += 0.1 * torch.randn(values.shape, generator=generator)
    return module.eval()


def converted(module: nn.Module, arguments: tuple[torch.Tensor, ...], **options: Any) -> ct.models.MLModel:
    """`module` as an ML Program for iOS 16 in float32, unless `options` say otherwise."""
    program = torch.export.export(module, arguments).run_decompositions({})
    options = {
        "minimum_deployment_target": ct.target.iOS16,
        "compute_precision": ct.precision.FLOAT32,
        "convert_to": "mlprogram",
        "skip_model_load": True,
    } | options
    return ct.convert(program, **options)


def saved(model: ct.models.MLModel, path: Path) -> Path:
    """`model` on disk."""
    model.save(str(path))
    return path
