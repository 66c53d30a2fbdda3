"""mamba_ssm.ops.triton.layer_norm: layer and RMS norm fused with the residual sum before them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemix.errors import UnsupportedOpError


def rms_norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight + bias over the last axis, in the dtype of x; inside, at least float32."""
    wide = _wide(x)
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    """Layer norm over the last axis, in the dtype of x; inside, at least float32."""
    wide = _wide(x)
    bias = None if bias is None else bias.to(wide.dtype)
    return F.layer_norm(wide, (x.shape[-1],), weight.to(wide.dtype), bias, eps).to(x.dtype)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
    upcast: bool = True,  # noqa: ARG001 -- the references' argument; sums are always at least float32
) -> Any:
    """Norm of rowscale·x + x1 + residual.

    Args:
        x, x1, residual: (..., d).
        weight, bias: (d,).
        weight1, bias1: of a second norm of the same sum.
        eps: added to the variance.
        dropout_p: not supported above 0.
        rowscale: (...,).
        prenorm: return the sum as well, in the dtype of the residual.
        residual_in_fp32: the sum is at least float32 where there is no residual yet.
        is_rms_norm: RMS norm in place of layer norm.
        return_dropout_mask: not supported.
        upcast: as it always is.

    Returns:
        y, (y, sum), (y, y1) or (y, y1, sum).

    Raises:
        UnsupportedOpError: dropout.
    """
    if dropout_p > 0 or return_dropout_mask:
        raise UnsupportedOpError("mobilemix's layer_norm_fn is for evaluation, without dropout; set dropout_p=0")
    total = _wide(x)
    if rowscale is not None:
        total = total * rowscale.unsqueeze(-1)
    for other in (x1, residual):
        if other is not None:
            total = total + other
    norm = rms_norm if is_rms_norm else layer_norm
    outputs = [norm(total, weight, eps, bias).to(x.dtype)]
    if weight1 is not None:
        outputs.append(norm(total, weight1, eps, bias1).to(x.dtype))
    if prenorm:
        kept = residual.dtype if residual is not None else total.dtype if residual_in_fp32 else x.dtype
        outputs.append(total.to(kept))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def rms_norm_fn(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, **options: Any) -> Any:
    """`layer_norm_fn` with RMS norm."""
    return layer_norm_fn(x, weight, bias, residual, is_rms_norm=True, **options)


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    *,
    prenorm: bool = False,
    **options: Any,
) -> Any:
    """`layer_norm_fn` followed by a linear layer."""
    y, total = layer_norm_fn(x, norm_weight, norm_bias, residual, prenorm=True, **options)
    y = F.linear(y, linear_weight, linear_bias)
    return (y, total) if prenorm else y


class RMSNorm(nn.Module):
    """RMS norm over the last axis; state: weight (hidden_size,)."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Weights of one; dropout_p is of training, and has no effect here."""
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0 else None
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Any:
        """(..., d) to (..., d), after the sum with the residual; with `prenorm` also the sum."""
        return rms_norm_fn(
            x, self.weight, None, residual, eps=self.eps, prenorm=prenorm, residual_in_fp32=residual_in_fp32
        )


softplus = F.softplus


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
