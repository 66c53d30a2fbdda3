"""The scan of Mamba-2, or state-space duality (Dao and Gu, arXiv 2405.21060): one scalar decay per head and step."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.errors import InputError
from mobilemix.ops.reference import check_real, check_shape, register_gradient, wide

_NAME = "ssd_chunk_scan"


def ssd_chunk_scan(
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
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = H_t·C_t + D·x_t with H_t = exp(Δ_t·A)·H_{t−1} + Δ_t·x_t·B_tᵀ, of every head; then y·silu(z).

    Args:
        x: input, (b, l, h, p).
        dt: step Δ before bias and softplus, (b, l, h).
        A: (h,), real.
        B: (b, l, g, n), where group i is for heads i·h/g to (i + 1)·h/g − 1.
        C: (b, l, g, n).
        chunk_size: steps per chunk of the algorithm that the model was trained with; it does not change the result,
            and a lowering may take another.
        D: skip, (h,) or (h, p).
        z: gate, (b, l, h, p).
        dt_bias: added to dt, (h,).
        initial_states: H_{−1}, (b, h, p, n); None is 0.
        dt_softplus: softplus of dt after the bias.
        dt_limit: dt after both is clamped to this range.
        return_final_states: return (y, H after the last step).

    Returns:
        y, (b, l, h, p), in the dtype of x; with `return_final_states` also the states, (b, h, p, n), at least float32.

    Raises:
        InputError: a shape does not fit, or a tensor is not real.
    """
    least, most = dt_limit
    out, states = torch.ops.mobilemix.ssd_chunk_scan(
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
        dt_softplus,
        least,
        None if most == math.inf else most,
    )
    return (out, states) if return_final_states else out


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
) -> None:
    tensors = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    check_real(_NAME, {**tensors, "initial_states": initial_states})
    if x.dim() != 4 or B.dim() != 4:
        raise InputError(f"{_NAME} takes x (b, l, h, p) and B (b, l, g, n), not {tuple(x.shape)} and {tuple(B.shape)}")
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    check_shape(_NAME, "dt", dt, (batch, length, heads))
    for name in ("A", "dt_bias"):
        check_shape(_NAME, name, tensors[name], (heads,))
    for name in ("B", "C"):
        check_shape(_NAME, name, tensors[name], (batch, length, groups, size))
    check_shape(_NAME, "D", D, (heads,), (heads, width))
    check_shape(_NAME, "z", z, (batch, length, heads, width))
    check_shape(_NAME, "initial_states", initial_states, (batch, heads, width, size))
    if heads % groups:
        raise InputError(f"{_NAME} has {heads} heads, which {groups} groups of B and C do not divide")


def _kernel(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,  # noqa: ARG001
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
) -> tuple[Tensor, Tensor]:
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states)
    dtype = wide(x, dt, A, B, C, D, z, dt_bias, initial_states)
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    values, step = x.to(dtype), dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    step = step.clamp(dt_min, dt_max)
    decay = torch.exp(step * A.to(dtype))
    inputs, outputs = (matrix.to(dtype).repeat_interleave(heads // groups, 2) for matrix in (B, C))
    state = values.new_zeros(batch, heads, width, size) if initial_states is None else initial_states.to(dtype)
    read = []
    for t in range(length):
        arriving = (step[:, t, :, None] * values[:, t]).unsqueeze(-1) * inputs[:, t].unsqueeze(-2)
        state = decay[:, t, :, None, None] * state + arriving
        read.append((state @ outputs[:, t].unsqueeze(-1)).squeeze(-1))
    y = torch.stack(read, 1)
    if D is not None:
        y = y + values * D.to(dtype).reshape(heads, -1)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), state


@torch.library.custom_op("mobilemix::ssd_chunk_scan", mutates_args=())
def _operator(
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
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,  # a schema cannot say infinity
) -> tuple[Tensor, Tensor]:
    return _kernel(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, dt_softplus, dt_min, dt_max)


@_operator.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,  # noqa: ARG001
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,  # noqa: ARG001
    dt_min: float = 0.0,  # noqa: ARG001
    dt_max: float | None = None,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states)
    batch, _, heads, width = x.shape
    dtype = wide(x, dt, A, B, C, D, z, dt_bias, initial_states)
    return x.new_empty(x.shape), x.new_empty((batch, heads, width, B.shape[3]), dtype=dtype)


register_gradient(_operator, _kernel)
