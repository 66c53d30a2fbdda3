"""The compiled extensions of mamba_ssm, causal_conv1d and VMamba's line, as their Python wrappers call them.

Each `fwd` returns what the kernel returns: the output, and `x`, (b, d, 1, 2n), of which wrappers read the last state as
`x[:, :, -1, 1::2]`. There is no `bwd`.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.errors import UnsupportedOpError
from mobilemix.shims.causal_conv1d import causal_conv1d_fn
from mobilemix.shims.selective_scan import selective_scan_fn


def mamba_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """selective_scan_cuda.fwd: [y, x], and y·silu(z) where there is a gate."""
    outputs = core_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus)
    if z is not None:
        outputs.append(outputs[0] * F.silu(z))
    return outputs


def core_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,  # noqa: ARG001 -- how the kernel shares its work
) -> list[Tensor]:
    """selective_scan_cuda_core.fwd, and that of _nrow and _ndstate: [y, x]."""
    y, state = selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus, return_last_state=True)
    return [y, torch.stack((state, state), -1).flatten(-2).unsqueeze(2)]


def oflex_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,
    out_float: bool = True,
) -> list[Tensor]:
    """selective_scan_cuda_oflex.fwd: [y, x], where y of a narrower u may be float32."""
    if out_float:
        u = u.to(torch.promote_types(u.dtype, torch.float32))
    return core_fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, nrows)


def selective_scan_without_gate(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,  # noqa: ARG001 -- as above
) -> Tensor:
    """selective_scan_fn of VMamba's own package `selective_scan`."""
    y: Tensor = selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    return y


core = SimpleNamespace(fwd=core_fwd)
"""selective_scan_cuda_core, as a name inside a package."""


def causal_conv1d_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Tensor | bool | None) -> Tensor:
    """causal_conv1d_cuda.causal_conv1d_fwd of every release that returns its output; the last option is the SiLU.

    Raises:
        UnsupportedOpError: packed sequences, states or a buffer for the output.
    """
    *tensors, silu = options
    if any(tensor is not None for tensor in tensors):
        raise UnsupportedOpError("mobilemix's causal_conv1d_fwd takes x, weight, bias and the activation alone")
    y: Tensor = causal_conv1d_fn(x, weight, bias, activation="silu" if silu else None)
    return y
