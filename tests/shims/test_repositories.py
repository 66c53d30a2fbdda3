"""Blocks that import and call as public repositories do, captured with their scans whole."""

import collections
import importlib
import sys

import pytest
import torch

from mobilemix.capture import capture
from mobilemix.shims import shim

EXACT = {"rtol": 1e-5, "atol": 1e-6}

# VMamba: compiled scans inside an autograd.Function, a triton module that needs triton to be imported at all, and a
# CUDA device that is entered whatever the tensor's.
VMAMBA = """
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import nn

try:
    import selective_scan_cuda_oflex
    OFLEX = True
except ImportError:
    OFLEX = False


@triton.jit
def cross_scan_kernel(x: tl.tensor, y: tl.tensor, H: tl.constexpr):
    tl.store(y, tl.load(x))


class CrossScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        b, c, h, w = x.shape
        y = x.new_empty((b, 4, c, h * w))
        y[:, 0] = x.flatten(2)
        y[:, 1] = x.transpose(2, 3).flatten(2)
        y[:, 2:4] = torch.flip(y[:, 0:2], dims=[-1])
        return y


class SelectiveScan(torch.autograd.Function):
    @staticmethod
    @torch.cuda.amp.custom_fwd
    def forward(ctx, u, delta, A, B, C, D, delta_bias, delta_softplus, oflex):
        out, x, *rest = selective_scan_cuda_oflex.fwd(u, delta, A, B, C, D, delta_bias, delta_softplus, 1, oflex)
        ctx.save_for_backward(u, delta, A, B, C, D, delta_bias, x)
        return out


def cross_scan(x):
    with torch.cuda.device(x.device):
        return CrossScan.apply(x)


class SS2D(nn.Module):
    def __init__(self, dim=4, state=2, rank=3):
        super().__init__()
        self.state, self.rank = state, rank
        self.x_proj = nn.Parameter(torch.randn(4, rank + 2 * state, dim))
        self.dt_proj = nn.Parameter(torch.randn(4, dim, rank))
        self.dt_bias = nn.Parameter(torch.randn(4 * dim))
        self.A_logs = nn.Parameter(torch.randn(4 * dim, state))
        self.Ds = nn.Parameter(torch.randn(4 * dim))

    def forward(self, x):
        b, c, h, w = x.shape
        xs = cross_scan(x)
        projected = torch.einsum("bkdl,kcd->bkcl", xs, self.x_proj)
        dts, B, C = projected.split([self.rank, self.state, self.state], dim=2)
        dts = torch.einsum("bkrl,kdr->bkdl", dts, self.dt_proj)
        A = -torch.exp(self.A_logs.to(torch.float))
        args = xs.reshape(b, -1, h * w), dts.reshape(b, -1, h * w), A, B.contiguous(), C.contiguous()
        ys = SelectiveScan.apply(*args, self.Ds.to(torch.float), self.dt_bias, True, True).view(b, 4, c, h, w)
        ys = ys.flatten(3)
        y = ys[:, 0:2] + ys[:, 2:4].flip(dims=[-1])
        return y[:, 0] + y[:, 1].view(b, c, w, h).transpose(2, 3).reshape(b, c, -1)


def make():
    assert OFLEX
    return SS2D(), (1, 4, 3, 5)
"""

# VMamba's main file by itself: its helpers are found by their own names.
VMAMBA_ALONE = """
import torch
from torch import nn
try:
    from .csm_triton import cross_scan_fn, cross_merge_fn
except:
    from csm_triton import cross_scan_fn, cross_merge_fn
try:
    from .csms6s import selective_scan_fn, selective_scan_flop_jit
except:
    from csms6s import selective_scan_fn, selective_scan_flop_jit


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.A, self.D = nn.Parameter(-torch.rand(16, 2)), nn.Parameter(torch.randn(16))
        self.B = nn.Conv1d(4, 8, 1)

    def forward(self, x):
        xs = cross_scan_fn(x, in_channel_first=True, out_channel_first=True, scans=0)
        b, k, c, l = xs.shape
        B, C = self.B(x.flatten(2)).view(b, 4, 2, l), self.B(x.flatten(2)).view(b, 4, 2, l)
        ys = selective_scan_fn(xs.view(b, -1, l), xs.view(b, -1, l), self.A, B, C, self.D, None, True, True)
        return cross_merge_fn(ys.view(b, 4, c, *x.shape[2:]), in_channel_first=True, out_channel_first=True)


def make():
    return Layer(), (1, 4, 3, 5)
"""

# Vision Mamba: its fork's layer, norms from triton, names of mamba_ssm's utilities, residuals added late.
VISION_MAMBA = """
import torch
from torch import nn
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.utils.generation import GenerationMixin
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
try:
    from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn
except ImportError:
    RMSNorm, layer_norm_fn, rms_norm_fn = None, None, None


class VisionMamba(nn.Module):
    def __init__(self, dim=16, depth=2):
        super().__init__()
        self.mixers = nn.ModuleList(Mamba(dim, bimamba_type="v2", if_divide_out=True) for _ in range(depth))
        self.norms = nn.ModuleList(RMSNorm(dim, eps=1e-5) for _ in range(depth + 1))

    def forward(self, x):
        residual = None
        for norm, mixer in zip(self.norms, self.mixers):
            fused = rms_norm_fn if isinstance(norm, RMSNorm) else layer_norm_fn
            x, residual = fused(
                x, norm.weight, norm.bias, residual=residual, prenorm=True, residual_in_fp32=True, eps=norm.eps
            )
            x = mixer(x, inference_params=None)
        norm = self.norms[-1]
        return rms_norm_fn(x, norm.weight, norm.bias, eps=norm.eps, residual=residual, prenorm=False)


def make():
    return VisionMamba(), (1, 9, 16)
"""

# The first form of Vision Mamba, and the raw functions.
BIMAMBA = """
import torch
from torch import nn
from mamba_ssm.ops.selective_scan_interface import bimamba_inner_fn, mamba_inner_fn, selective_scan_fn


class Both(nn.Module):
    def __init__(self, dim=8, state=4, rank=2):
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim)
        self.conv1d = nn.Conv1d(dim, dim, 4, groups=dim, padding=3)
        self.x_proj = nn.Linear(dim, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.A_log, self.A_b_log = nn.Parameter(torch.randn(dim, state)), nn.Parameter(torch.randn(dim, state))
        self.D = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        xz = self.in_proj(x).transpose(1, 2)
        return bimamba_inner_fn(
            xz, self.conv1d.weight, self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight, self.out_proj.weight,
            self.out_proj.bias, -torch.exp(self.A_log.float()), -torch.exp(self.A_b_log.float()), None, None,
            self.D.float(), delta_bias=self.dt_proj.bias.float(), delta_softplus=True,
        )


def make():
    return Both(), (2, 7, 8)
"""

# MambaVision: halves of the channels, convolutions that see both ways, a scan of one half.
MAMBA_VISION = """
import torch
import torch.nn.functional as F
from torch import nn
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn


class MambaVisionMixer(nn.Module):
    def __init__(self, dim=8, state=4, rank=2):
        super().__init__()
        self.state, self.rank, half = state, rank, dim // 2
        self.in_proj, self.out_proj = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.x_proj = nn.Linear(half, rank + 2 * state, bias=False)
        self.dt_proj = nn.Linear(rank, half)
        self.A_log, self.D = nn.Parameter(torch.randn(half, state)), nn.Parameter(torch.ones(half))
        self.conv1d_x = nn.Conv1d(half, half, 3, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 3, groups=half, bias=False)

    def forward(self, x):
        b, l, _ = x.shape
        x, z = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        A = -torch.exp(self.A_log.float())
        x = F.silu(F.conv1d(x, self.conv1d_x.weight, None, padding="same", groups=x.shape[1]))
        z = F.silu(F.conv1d(z, self.conv1d_z.weight, None, padding="same", groups=z.shape[1]))
        projected = self.x_proj(x.transpose(1, 2).reshape(b * l, -1))
        dt, B, C = torch.split(projected, [self.rank, self.state, self.state], dim=-1)
        dt = self.dt_proj(dt).view(b, l, -1).transpose(1, 2)
        B, C = (matrix.view(b, l, -1).transpose(1, 2).contiguous() for matrix in (B, C))
        y = selective_scan_fn(
            x, dt, A, B, C, self.D.float(), z=None, delta_bias=self.dt_proj.bias.float(), delta_softplus=True,
            return_last_state=None,
        )
        return self.out_proj(torch.cat([y, z], dim=1).transpose(1, 2))


def make():
    return MambaVisionMixer(), (2, 9, 8)
"""

# VSSD with its causal path: SSD both ways, on a subclass of Tensor.
VSSD = """
import torch
import torch.nn.functional as F
from torch import nn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
from mamba_ssm.ops.triton.layernorm_gated import RMSNorm as RMSNormGated
from mamba_ssm.ops.triton.selective_state_update import selective_state_update


class tTensor(torch.Tensor):
    @property
    def shape(self):
        return tuple(int(size) for size in super().shape)


class Mixer(nn.Module):
    def __init__(self, heads=4, width=4, state=4, groups=2):
        super().__init__()
        self.heads, self.width, self.state, self.groups = heads, width, state, groups
        dim = heads * width
        self.in_proj = nn.Linear(dim, dim + 2 * groups * state + heads)
        self.A_log, self.D = nn.Parameter(torch.rand(heads)), nn.Parameter(torch.ones(heads))
        self.norm = RMSNormGated(dim, eps=1e-5, norm_before_gate=False)

    def forward(self, u):
        b, l, dim = u.shape
        state = self.groups * self.state
        x, B, C, dt = self.in_proj(u).split([dim, state, state, self.heads], dim=-1)
        x, dt, B, C = (tTensor(value) for value in (x, F.softplus(dt), B, C))
        x = tTensor(x.view(b, l, self.heads, self.width)).chunk(2, dim=-2)
        B, C = (value.view(b, l, self.groups, -1).chunk(2, dim=-2) for value in (B, C))
        dt, A, D = dt.chunk(2, dim=-1), (-torch.exp(self.A_log)).chunk(2), self.D.chunk(2)
        forwards = mamba_chunk_scan_combined(
            x[0], dt[0], A[0], B[0], C[0], chunk_size=4, D=D[0], z=None, seq_idx=None, initial_states=None
        )
        backwards = mamba_chunk_scan_combined(
            x[1].flip(1), dt[1].flip(1), A[1], B[1].flip(1), C[1].flip(1), chunk_size=4, D=D[1], z=None, seq_idx=None
        )
        y = torch.cat([forwards, backwards.flip(1)], dim=-2)
        return self.norm(y.reshape(b, l, dim), u)


def make():
    return Mixer(), (2, 8, 16)
"""

# Restoration and medical networks: either of two packages of scans, a whole layer, and a dtype asserted.
UNETS = """
import torch
from torch import nn
from mamba_ssm import Mamba
try:
    from selective_scan import selective_scan_fn as selective_scan_fn_v1
    from selective_scan import selective_scan_ref as selective_scan_ref_v1
except:
    pass


class Layer(nn.Module):
    def __init__(self, dim=8):
        super().__init__()
        self.mamba = Mamba(d_model=dim, d_state=4, d_conv=4, expand=2)
        self.A, self.D = nn.Parameter(-torch.rand(dim, 4)), nn.Parameter(torch.ones(dim))
        self.proj = nn.Linear(dim, dim + 8)

    def forward(self, x):
        x = self.mamba(x.flatten(2).transpose(-1, -2)).transpose(-1, -2)
        dt, B, C = self.proj(x.transpose(1, 2)).transpose(1, 2).split([x.shape[1], 4, 4], dim=1)
        y = selective_scan_fn_v1(x.float(), dt.float(), self.A, B[:, None], C[:, None], self.D, None, True)
        assert y.dtype == torch.float
        return y


def make():
    return Layer(), (1, 8, 3, 3)
"""

CASES = {
    "vmamba": (VMAMBA, {"selective_scan": 1}),
    "vmamba_alone": (VMAMBA_ALONE, {"selective_scan": 1}),
    "vision_mamba": (VISION_MAMBA, {"selective_scan": 4}),
    "bimamba": (BIMAMBA, {"selective_scan": 2}),
    "mamba_vision": (MAMBA_VISION, {"selective_scan": 1}),
    "vssd": (VSSD, {"ssd_chunk_scan": 2}),
    "unets": (UNETS, {"selective_scan": 2}),
}


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Import a text as a file of a repository."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    written = []

    def load(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        written.append(name)
        return importlib.import_module(name)

    yield load
    for name in written:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("case", CASES)
def test_scans_stay_whole(repository, case):
    text, expected = CASES[case]
    with pytest.raises(ImportError):
        repository(f"without_{case}", text)
    torch.manual_seed(0)
    with shim("mamba"):
        module, shape = repository(f"with_{case}", text).make()
        x = torch.randn(shape)
        program = capture(module, (x,))
        with torch.no_grad():
            eager = torch.Tensor(module(x))
            double = torch.Tensor(module.double()(x.double()))
    operators = collections.Counter(str(node.target) for node in program.graph.nodes if node.op == "call_function")
    scans = {name: operators[f"mobilemix.{name}.default"] for name in ("selective_scan", "ssd_chunk_scan")}
    assert {name: count for name, count in scans.items() if count} == expected
    # Nothing of the shim is needed to run what was captured.
    torch.testing.assert_close(program.module()(x), eager, **EXACT)
    torch.testing.assert_close(eager.double(), double.double(), rtol=1e-4, atol=1e-5)
