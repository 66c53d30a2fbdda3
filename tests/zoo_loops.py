"""`zoo_scans` with its CUDA packages replaced by loops over time, as plain as the recurrences are written.

They share nothing with mobilemix, so they check its scans; and they are what stock exporters can be given instead.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F


def load() -> ModuleType:
    """The module `zoo_scans` on loops, beside the one that `import zoo_scans` gives."""
    offers = {
        "selective_scan_cuda_oflex": {"fwd": _oflex_fwd},
        "mamba_ssm.ops.selective_scan_interface": {
            "mamba_inner_fn_no_out_proj": _mamba_inner,
            "selective_scan_fn": _selective_scan,
        },
        "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": _chunk_scan},
    }
    modules = {name: ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", *offers)}
    for name, offer in offers.items():
        vars(modules[name]).update(offer)
    spec = importlib.util.spec_from_file_location("zoo_scans_on_loops", Path(__file__).with_name("zoo_scans.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, modules):
        spec.loader.exec_module(module)
    return module


def _selective_scan(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t, y_t = C_t h_t + D u_t."""
    assert delta_bias is not None
    assert delta_softplus
    assert not return_last_state
    delta = F.softplus(delta + delta_bias[:, None])
    if b.dim() == 3:
        b, c = b[:, None], c[:, None]
    b, c = (matrix.repeat_interleave(u.shape[1] // matrix.shape[1], dim=1) for matrix in (b, c))
    h, outputs = torch.zeros((*u.shape[:2], a.shape[1]), dtype=u.dtype), []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = torch.exp(step * a) * h + step * b[..., t] * u[:, :, t, None]
        outputs.append((h * c[..., t]).sum(-1))
    y = torch.stack(outputs, dim=2) + u * d[:, None]
    return y if z is None else y * F.silu(z)


def _oflex_fwd(
    u: Tensor,
    delta: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
    rows: int,
    out_float: bool,
) -> list[Tensor]:
    return [_selective_scan(u, delta, a, b, c, d, None, delta_bias, delta_softplus)]


def _mamba_inner(
    xz: Tensor,
    convolution: Tensor,
    convolution_bias: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    a: Tensor,
    b: None,
    c: None,
    d: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool,
) -> Tensor:
    """Causal convolution and SiLU, the projections to Δ, B and C, the scan, and the gate."""
    x, z = xz.chunk(2, dim=1)
    width = convolution.shape[2]
    x = F.silu(F.conv1d(F.pad(x, (width - 1, 0)), convolution, convolution_bias, groups=x.shape[1]))
    states, rank = a.shape[1], dt_proj.shape[1]
    delta, write, read = (x_proj @ x).split((rank, states, states), dim=1)
    return _selective_scan(x, dt_proj @ delta, a, write, read, d, z, delta_bias, delta_softplus)


def _chunk_scan(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk_size: int, D: Tensor, z: Tensor | None = None
) -> Tensor:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_tᵀ, y_t = h_t C_t + D x_t, for each head; one group of B and C."""
    assert z is None
    h, outputs = torch.zeros((*x.shape[:1], *x.shape[2:], b.shape[-1]), dtype=x.dtype), []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * a)[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        outputs.append((h * c[:, t, :, None]).sum(-1))
    return torch.stack(outputs, dim=1) + D[:, None] * x
