"""mamba_ssm.ops.selective_scan_interface, with the names that the forks of Vision Mamba and its line add to it.

Shapes are mamba_ssm's: u, delta, z (b, d, l); A (d, n); B, C (d, n), (b, n, l) or (b, g, n, l). The weights of a whole
Mamba layer: conv1d (d, 1, width), x_proj (rank + 2n, d), delta_proj (d, rank), out_proj (model, d); xz is (b, 2d, l).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.ops import selective_scan
from mobilemix.shims.causal_conv1d import causal_conv1d_fn
from mobilemix.shims.layer_norm import rms_norm

selective_scan_fn: Callable[..., Any] = selective_scan


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,  # noqa: ARG001 -- memory of the backward pass; so below
    b_rms_weight: Tensor | None = None,
    c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None,
    b_c_dt_rms_eps: float = 1e-6,
) -> Tensor:
    """A Mamba layer after its input projection: (b, 2d, l) to (b, l, model)."""
    x, z = xz.chunk(2, dim=1)
    x, delta, B, C = _project(
        x,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A.shape[1],
        B,
        C,
        B_proj_bias,
        C_proj_bias,
    )
    if b_rms_weight is not None:
        B = rms_norm(B.mT, b_rms_weight, b_c_dt_rms_eps).mT
    if c_rms_weight is not None:
        C = rms_norm(C.mT, c_rms_weight, b_c_dt_rms_eps).mT
    if dt_rms_weight is not None:
        delta = rms_norm(delta.mT, dt_rms_weight, b_c_dt_rms_eps).mT
    y = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.mT, out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,  # noqa: ARG001
) -> Tensor:
    """The same without the output projection: (b, 2d, l) to (b, d, l)."""
    x, z = xz.chunk(2, dim=1)
    x, delta, B, C = _project(
        x,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A.shape[1],
        B,
        C,
        B_proj_bias,
        C_proj_bias,
    )
    y: Tensor = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return y


def bimamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    A_b: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    checkpoint_lvl: int = 1,  # noqa: ARG001
) -> Tensor:
    """Forwards with A plus backwards with A_b, which share everything else: (b, 2d, l) to (b, l, model)."""
    x, z = xz.chunk(2, dim=1)
    x, delta, B, C = _project(
        x,
        conv1d_weight,
        conv1d_bias,
        x_proj_weight,
        delta_proj_weight,
        A.shape[1],
        B,
        C,
        B_proj_bias,
        C_proj_bias,
    )
    forwards = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    u, step, read, write, gate = (_backwards(value) for value in (x, delta, B, C, z))
    backwards = selective_scan_fn(u, step, A_b, read, write, D, gate, delta_bias, delta_softplus)
    return F.linear((forwards + backwards.flip(-1)).mT, out_proj_weight, out_proj_bias)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """One step of the recurrence; `state` is changed in place.

    Args:
        state: (b, [h,] d, n).
        x, dt, z: (b, [h,] d).
        A: ([h,] d, n).
        B, C: (b, [g,] n).
        D, dt_bias: ([h,] d).
        dt_softplus: softplus of dt after the bias.

    Returns:
        (b, [h,] d), in the dtype of x.
    """
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    if state.dim() == 4:
        heads, groups = state.shape[1], B.shape[1]
        B, C = (matrix.repeat_interleave(heads // groups, 1) for matrix in (B, C))
    dt = dt.unsqueeze(-1)
    state.copy_(state * torch.exp(dt * A) + dt * B.unsqueeze(-2) * x.unsqueeze(-1))
    y = (state * C.unsqueeze(-2)).sum(-1)
    if D is not None:
        y = y + x * D
    if z is not None:
        y = y * F.silu(z)
    return y.to(x.dtype)


def _project(
    x: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    size: int,
    B: Tensor | None,
    C: Tensor | None,
    B_bias: Tensor | None,
    C_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The convolved input and what depends on it: (b, d, l), delta (b, d, l) and, unless given, B and C (b, n, l)."""
    x = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rank = delta_proj_weight.shape[1]
    projected = F.linear(x.mT, x_proj_weight)
    delta = F.linear(projected[..., :rank], delta_proj_weight).mT
    if B is None:
        B = _biased(projected[..., rank : rank + size], B_bias).mT
    if C is None:
        C = _biased(projected[..., projected.shape[-1] - size :], C_bias).mT
    return x, delta, B, C


def _biased(value: Tensor, bias: Tensor | None) -> Tensor:
    return value if bias is None else value + bias


def _backwards(value: Tensor) -> Tensor:
    """Time reversed, where the value has time."""
    return value.flip(-1) if value.dim() > 2 else value
