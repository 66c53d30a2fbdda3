"""mamba_ssm.ops.triton.layernorm_gated: norms with a gate, over groups of the last axis."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemix.shims.layer_norm import layer_norm, rms_norm


def layernorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    is_rms_norm: bool = False,
    upcast: bool = True,  # noqa: ARG001 -- the references' argument; always at least float32
) -> Tensor:
    """norm(x)·silu(z), or norm(x·silu(z)) with the gate first.

    Args:
        x, z: (..., d).
        weight, bias: (d,).
        eps: added to the variance.
        group_size: elements that are normalised together; None is d.
        norm_before_gate: the order.
        is_rms_norm: RMS norm in place of layer norm.
        upcast: as it always is.
    """
    norm = rms_norm if is_rms_norm else layer_norm
    if z is not None and not norm_before_gate:
        x = x * F.silu(z)
    if group_size is None or group_size == x.shape[-1]:
        y = norm(x, weight, eps, bias)
    else:
        groups = torch.unflatten(x, -1, (-1, group_size))
        y = norm(groups, weight.new_ones(group_size), eps).flatten(-2) * weight
        y = y if bias is None else y + bias
    return y * F.silu(z) if z is not None and norm_before_gate else y


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    upcast: bool = True,
) -> Tensor:
    """`layernorm_fn` with RMS norm."""
    return layernorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate, is_rms_norm=True, upcast=upcast)


class RMSNorm(nn.Module):
    """RMS norm with a gate; state: weight (hidden_size,)."""

    is_rms_norm = True

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Weights of one; the arguments of `layernorm_fn`."""
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter(
            "bias", None if self.is_rms_norm else nn.Parameter(torch.zeros(hidden_size, device=device, dtype=dtype))
        )

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """(..., d) to (..., d)."""
        return layernorm_fn(
            x, self.weight, self.bias, z, self.eps, self.group_size, self.norm_before_gate, self.is_rms_norm
        )


class LayerNorm(RMSNorm):
    """Layer norm with a gate; state: weight and bias (hidden_size,)."""

    is_rms_norm = False
