"""The selective scan of Mamba (Gu and Dao, arXiv 2312.00752, algorithm 2 and equations 1–2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.errors import InputError
from mobilemix.ops.reference import check_real, check_shape, register_gradient, wide

_NAME = "selective_scan"


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = ⟨C_t, h_t⟩ + D·u_t with h_t = exp(Δ_t·A)·h_{t−1} + Δ_t·B_t·u_t, of every channel d; then y·silu(z).

    Args:
        u: input, (b, d, l).
        delta: step Δ before bias and softplus, (b, d, l).
        A: (d, n), real.
        B: (d, n), (b, n, l) or (b, g, n, l), where group i is for channels i·d/g to (i + 1)·d/g − 1.
        C: as B; each may have another of these shapes.
        D: skip, (d,).
        z: gate, (b, d, l).
        delta_bias: added to delta, (d,).
        delta_softplus: softplus of delta after the bias.
        return_last_state: return (y, h after the last step).

    Returns:
        y, (b, d, l), in the dtype of u; with `return_last_state` also the state, (b, d, n), at least float32.

    Raises:
        InputError: a shape does not fit, or a tensor is not real.
    """
    out, last_state = torch.ops.mobilemix.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return (out, last_state) if return_last_state else out


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    tensors = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    check_real(_NAME, tensors)
    if u.dim() != 3 or A.dim() != 2:
        raise InputError(f"{_NAME} takes u (b, d, l) and A (d, n), not {tuple(u.shape)} and {tuple(A.shape)}")
    (batch, channels, length), size = u.shape, A.shape[1]
    check_shape(_NAME, "A", A, (channels, size))
    for name in ("delta", "z"):
        check_shape(_NAME, name, tensors[name], (batch, channels, length))
    for name in ("D", "delta_bias"):
        check_shape(_NAME, name, tensors[name], (channels,))
    for name, tensor in (("B", B), ("C", C)):
        groups = tensor.shape[1] if tensor.dim() == 4 else 1
        check_shape(_NAME, name, tensor, (channels, size), (batch, size, length), (batch, groups, size, length))
        if channels % groups:
            raise InputError(f"{_NAME} has {channels} channels, which {groups} groups of {name} do not divide")


def _steps(matrix: Tensor, channels: int) -> Tensor:
    """B or C as (l or 1, b or 1, d or 1, n)."""
    if matrix.dim() == 2:
        return matrix[None, None]
    if matrix.dim() == 3:
        return matrix.permute(2, 0, 1).unsqueeze(2)
    return matrix.permute(3, 0, 1, 2).repeat_interleave(channels // matrix.shape[1], 2)


def _kernel(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    _check(u, delta, A, B, C, D, z, delta_bias)
    dtype = wide(u, delta, A, B, C, D, z, delta_bias)
    (batch, channels, length), size = u.shape, A.shape[1]
    x, step, decay = u.to(dtype), delta.to(dtype), A.to(dtype)
    if delta_bias is not None:
        step = step + delta_bias.to(dtype).unsqueeze(-1)
    if delta_softplus:
        step = F.softplus(step)
    inputs, outputs = (_steps(matrix.to(dtype), channels).expand(length, -1, -1, -1) for matrix in (B, C))
    state, read = x.new_zeros(batch, channels, size), []
    for t in range(length):
        duration = step[:, :, t].unsqueeze(-1)
        state = torch.exp(duration * decay) * state + duration * inputs[t] * x[:, :, t].unsqueeze(-1)
        read.append((state * outputs[t]).sum(-1))
    y = torch.stack(read, -1)
    if D is not None:
        y = y + x * D.to(dtype).unsqueeze(-1)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), state


@torch.library.custom_op("mobilemix::selective_scan", mutates_args=())
def _operator(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    return _kernel(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


@_operator.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    _check(u, delta, A, B, C, D, z, delta_bias)
    dtype = wide(u, delta, A, B, C, D, z, delta_bias)
    return u.new_empty(u.shape), u.new_empty((*u.shape[:2], A.shape[1]), dtype=dtype)


register_gradient(_operator, _kernel)
