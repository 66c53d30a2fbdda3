"""mamba_ssm.ops.triton.ssd_combined: the scan of Mamba-2, alone and with all of a layer that is around it."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.errors import UnsupportedOpError
from mobilemix.ops import ssd_chunk_scan
from mobilemix.shims.causal_conv1d import causal_conv1d_fn
from mobilemix.shims.layernorm_gated import rmsnorm_fn


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,  # noqa: ARG001 -- states are at least float32
) -> Tensor | tuple[Tensor, Tensor]:
    """`mobilemix.ops.ssd_chunk_scan`, which has the shapes; sequences packed into one are not supported.

    Raises:
        UnsupportedOpError: seq_idx or cu_seqlens is given.
    """
    if seq_idx is not None or cu_seqlens is not None or return_varlen_states:
        raise UnsupportedOpError(
            "mobilemix's mamba_chunk_scan_combined takes one sequence per batch item; drop seq_idx and cu_seqlens"
        )
    return ssd_chunk_scan(
        x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, dt_softplus, dt_limit, return_final_states
    )


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,  # noqa: ARG001 -- as above
) -> Tensor | tuple[Tensor, Tensor]:
    """A Mamba-2 layer after its input projection.

    Args:
        zxbcdt: gate, input, B, C and step, (b, l, 2m + 2d + 2gn + h) with d = h·p; the first 2m are a gated path of
            their own beside the scan, and m is mostly 0.
        conv1d_weight: (d + 2gn, width).
        conv1d_bias: (d + 2gn,).
        dt_bias, A: (h,).
        D: (h,), with headdim, or (h, p).
        chunk_size, initial_states, dt_limit, return_final_states: as in `mobilemix.ops.ssd_chunk_scan`.
        seq_idx: not supported.
        activation: of the convolution.
        rmsnorm_weight: (d,); None gates without a norm.
        rmsnorm_eps: added to the mean square.
        outproj_weight, outproj_bias: (model, m + d), (model,); None leaves the projection out.
        headdim: p.
        ngroups: g.
        norm_before_gate: norm(y)·silu(z) rather than norm(y·silu(z)).
        state_dtype: without effect.

    Returns:
        (b, l, model); with `return_final_states` also the states.

    Raises:
        UnsupportedOpError: seq_idx is given.
    """
    heads = A.shape[0]
    width = D.shape[1] if D.dim() == 2 else headdim
    if width is None:
        raise UnsupportedOpError("mamba_split_conv1d_scan_combined needs headdim where D has one axis")
    inner = heads * width
    state = (conv1d_weight.shape[0] - inner) // 2
    beside = (zxbcdt.shape[-1] - 2 * inner - 2 * state - heads) // 2
    gate, value, z, xbc, dt = torch.split(zxbcdt, [beside, beside, inner, inner + 2 * state, heads], -1)
    xbc = causal_conv1d_fn(xbc.mT, conv1d_weight, conv1d_bias, seq_idx, activation=activation).mT
    x, B, C = xbc.split([inner, state, state], -1)
    y, states = ssd_chunk_scan(
        torch.unflatten(x, -1, (heads, width)),
        dt,
        A,
        torch.unflatten(B, -1, (ngroups, -1)),
        torch.unflatten(C, -1, (ngroups, -1)),
        chunk_size,
        D,
        torch.unflatten(z, -1, (heads, width)) if rmsnorm_weight is None else None,
        dt_bias,
        initial_states,
        True,
        dt_limit,
        return_final_states=True,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is not None:
        y = rmsnorm_fn(y, rmsnorm_weight, None, z, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if beside:
        y = torch.cat([F.silu(gate) * value, y], -1)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, states) if return_final_states else y


def selective_scan_chunk_fn(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    backend: str | None = None,  # noqa: ARG001 -- which of VMamba's kernels
) -> Tensor | tuple[Tensor, Tensor]:
    """`mamba_chunk_scan_combined` with VMamba's arguments (mamba2.ssd_minimal)."""
    return mamba_chunk_scan_combined(
        x,
        dt,
        A,
        B,
        C,
        chunk_size,
        D,
        z,
        dt_bias,
        initial_states,
        seq_idx,
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
        return_final_states=return_final_states,
    )
