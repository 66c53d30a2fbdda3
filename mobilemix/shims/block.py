"""mamba_ssm.modules.block, and what is around it: a mixer with its norm and residual sum."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemix.shims.layer_norm import RMSNorm, layer_norm_fn

Factory = Callable[[int], nn.Module]


class Block(nn.Module):
    """Sum, norm, mixer, and then the same with an MLP: the sum is done late, beside the norm that needs it.

    State: norm.*, mixer.*, and with an MLP norm2.*, mlp.*
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Factory,
        mlp_cls: Factory,
        norm_cls: Factory = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        """As mamba_ssm; an `mlp_cls` of nn.Identity is no MLP."""
        super().__init__()
        self.fused_add_norm = fused_add_norm
        self.residual_in_fp32 = residual_in_fp32
        self.norm = norm_cls(dim)
        self.mixer = mixer_cls(dim)
        self.mlp = None if mlp_cls is nn.Identity else mlp_cls(dim)
        if self.mlp is not None:
            self.norm2 = norm_cls(dim)

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """(b, l, d) and the residual before it to the same after it; the two are not added yet."""
        hidden_states, residual = self._add_and_norm(self.norm, hidden_states, residual)
        if inference_params is not None:
            options["inference_params"] = inference_params
        hidden_states = self.mixer(hidden_states, **options)
        if self.mlp is not None:
            hidden_states, residual = self._add_and_norm(self.norm2, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual

    def _add_and_norm(self, norm: nn.Module, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if isinstance(norm, nn.LayerNorm | RMSNorm):
            y, total = layer_norm_fn(
                x,
                norm.weight,
                norm.bias if isinstance(norm, nn.LayerNorm) else None,
                residual,
                eps=norm.eps,
                prenorm=True,
                residual_in_fp32=self.residual_in_fp32,
                is_rms_norm=isinstance(norm, RMSNorm),
            )
            return y, total
        total = x if residual is None else x + residual
        return norm(total), total.to(
            torch.promote_types(total.dtype, torch.float32)
        ) if self.residual_in_fp32 else total


class MambaBlock(Block):
    """The block of mamba_ssm 1, in mamba_simple: without an MLP."""

    def __init__(
        self,
        dim: int,
        mixer_cls: Factory,
        norm_cls: Factory = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
    ) -> None:
        """As mamba_ssm 1."""
        super().__init__(dim, mixer_cls, nn.Identity, norm_cls, fused_add_norm, residual_in_fp32)


class GatedMLP(nn.Module):
    """fc2(y·activation(gate)) with (y, gate) = fc1(x); state: fc1, fc2 (weight, and bias if asked for)."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.silu,
        bias: bool = False,
        multiple_of: int = 128,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """The hidden width, 8/3 of the input's if left out, is rounded up to a multiple."""
        super().__init__()
        hidden = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden = -(-hidden // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden, bias=bias, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, out_features or in_features, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y, gate = self.fc1(x).chunk(2, -1)
        result: Tensor = self.fc2(y * self.activation(gate))
        return result
