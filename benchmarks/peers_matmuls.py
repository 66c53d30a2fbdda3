"""AFFNet's filter as somebody would write it by hand for an exporter without FFTs: separable real matrix products."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemix.models.affnet import SPARSITY, AdaptiveFrequencyFilter, _complex_linear


class SeparableFilter(nn.Module):
    """`AdaptiveFrequencyFilter` of maps of one size, its transforms along W and then along H as products."""

    def __init__(self, of: AdaptiveFrequencyFilter, height: int, width: int):
        super().__init__()
        self.w1, self.b1, self.w2, self.b2 = of.w1, of.b1, of.w2, of.b2
        self.groups = of.w1.shape[1]
        half = width // 2 + 1
        # A bin of the half spectrum stands for its conjugate too, except the first and, of an even width, the last.
        weight = torch.full((half,), 2.0, dtype=torch.float64)
        weight[0] = 1
        if width % 2 == 0:
            weight[-1] = 1
        for name, rows, columns, size in (("w", width, half, width), ("h", height, height, height)):
            angles = torch.outer(torch.arange(rows), torch.arange(columns)).double() * (2 * math.pi / size)
            cosine, sine = angles.cos() / math.sqrt(size), angles.sin() / math.sqrt(size)
            self.register_buffer(f"{name}_cos", cosine.float())
            self.register_buffer(f"{name}_sin", sine.float())
            if name == "w":
                self.register_buffer("back_cos", (cosine * weight).T.contiguous().float())
                self.register_buffer("back_sin", (sine * weight).T.contiguous().float())

    def forward(self, x: Tensor) -> Tensor:
        real, imag = x @ self.w_cos, -(x @ self.w_sin)
        real, imag = self.h_cos @ real + self.h_sin @ imag, self.h_cos @ imag - self.h_sin @ real
        u, v = real.unflatten(1, (self.groups, -1)), imag.unflatten(1, (self.groups, -1))
        u, v = _complex_linear(u, v, self.w1, self.b1)
        u, v = _complex_linear(F.silu(u), F.silu(v), self.w2, self.b2)
        u, v = F.softshrink(u, SPARSITY).flatten(1, 2), F.softshrink(v, SPARSITY).flatten(1, 2)
        real, imag = real * u - imag * v, real * v + imag * u
        real, imag = self.h_cos @ real - self.h_sin @ imag, self.h_cos @ imag + self.h_sin @ real
        return x + (real @ self.back_cos - imag @ self.back_sin)


def without_ffts(model: nn.Module, inputs: tuple[Tensor]) -> nn.Module:
    """`model` with every filter replaced, in place; `inputs` tell the sizes."""
    sizes: dict[str, tuple[int, int]] = {}
    filters = {name: one for name, one in model.named_modules() if isinstance(one, AdaptiveFrequencyFilter)}
    hooks = [
        one.register_forward_pre_hook(lambda _module, given, name=name: sizes.update({name: given[0].shape[-2:]}))
        for name, one in filters.items()
    ]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()
    for name, one in filters.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, SeparableFilter(one, *sizes[name]))
    return model
