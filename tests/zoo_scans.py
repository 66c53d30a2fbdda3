"""Blocks of the zoo that mix by state-space scans, each written from its paper, as small as its equations allow.

The scans are imported and called as the authors' repositories do, so that importing this module needs their CUDA
packages, or `mobilemix.shims` in their place.
"""

import math
from collections.abc import Callable

import selective_scan_cuda_oflex
import torch
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn_no_out_proj, selective_scan_fn
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
from torch import Tensor, nn
from torch.nn import functional as F

STATES = 16


class Selection(nn.Module):
    """Parameters of K independent selective scans over C channels (arXiv 2312.00752, algorithm 2).

    A = −exp(A_log), Δ = softplus(W_dt W_x u + bias), B and C = W_x u. Drawn over the ranges that trained models show.
    """

    def __init__(self, channels: int, scans: int = 1, states: int = STATES):
        super().__init__()
        self.scans, self.channels, self.states = scans, channels, states
        self.rank = math.ceil(channels / 16)
        inner = self.rank + 2 * states
        self.x_proj = nn.Parameter(torch.randn(scans, inner, channels) / math.sqrt(channels))
        self.dt_proj = nn.Parameter(torch.randn(scans, channels, self.rank) / math.sqrt(self.rank))
        self.dt_bias = nn.Parameter(torch.empty(scans * channels).uniform_(-4, 0))
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, states + 1)).repeat(scans * channels, 1))
        self.D = nn.Parameter(torch.randn(scans * channels))

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u (B, K, C, L) to Δ before its bias (B, K·C, L), A (K·C, N), B and C (B, K, N, L)."""
        projected = torch.einsum("bkcl,kpc->bkpl", u, self.x_proj)
        dt, b, c = projected.split((self.rank, self.states, self.states), dim=2)
        dt = torch.einsum("bkrl,kcr->bkcl", dt, self.dt_proj).flatten(1, 2)
        return dt, -torch.exp(self.A_log.float()), b.contiguous(), c.contiguous()


class VisionMambaBlock(nn.Module):
    """Bidirectional block (arXiv 2401.09417, algorithm 1): T + Linear(SSM_f · SiLU(z) + SSM_b · SiLU(z)).

    Each direction has a convolution and a selection of its own. Shapes: (B, L, C) to the same.
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = 2 * channels
        self.norm = nn.LayerNorm(channels)
        self.into, self.out = nn.Linear(channels, 2 * inner, bias=False), nn.Linear(inner, channels, bias=False)
        self.convolutions = nn.ModuleList(nn.Conv1d(inner, inner, 4, groups=inner) for _ in range(2))
        self.selections = nn.ModuleList(Selection(inner) for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        xz = self.into(self.norm(tokens)).transpose(1, 2)
        forwards, backwards = self._scan(xz, 0), self._scan(xz.flip([-1]), 1).flip([-1])
        return tokens + self.out((forwards + backwards).transpose(1, 2))

    def _scan(self, xz: Tensor, direction: int) -> Tensor:
        convolution, selection = self.convolutions[direction], self.selections[direction]
        return mamba_inner_fn_no_out_proj(
            xz,
            convolution.weight,
            convolution.bias,
            selection.x_proj[0],
            selection.dt_proj[0],
            -torch.exp(selection.A_log.float()),
            None,
            None,
            selection.D.float(),
            delta_bias=selection.dt_bias.float(),
            delta_softplus=True,
        )


class CrossScan(torch.autograd.Function):
    """A map (B, C, H, W) as four sequences (B, 4, C, L): rows, columns, both from the end; written in place."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        sequences = x.new_empty((batch, 4, channels, height * width))
        sequences[:, 0] = x.flatten(2)
        sequences[:, 1] = x.transpose(2, 3).flatten(2)
        sequences[:, 2:] = sequences[:, :2].flip([-1])
        return sequences


class CrossMerge(torch.autograd.Function):
    """Four sequences (B, 4, C, L) summed on their map (B, C, L)."""

    @staticmethod
    def forward(ctx: object, y: Tensor, height: int, width: int) -> Tensor:
        y = y[:, :2] + y[:, 2:].flip([-1])
        return y[:, 0] + y[:, 1].unflatten(-1, (width, height)).transpose(2, 3).flatten(2)


class FlexibleScan(torch.autograd.Function):
    """VMamba's compiled extension behind an autograd.Function; the output may be wider than the input."""

    @staticmethod
    def forward(ctx: object, u: Tensor, *tensors: Tensor) -> Tensor:
        delta, a, b, c, d, bias = tensors
        out, *_ = selective_scan_cuda_oflex.fwd(u, delta, a, b, c, d, bias, True, 1, True)
        return out


def mamba_ssm_scan(u: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, bias: Tensor) -> Tensor:
    """The interface of mamba_ssm, called as MambaIR and MambaVision do."""
    return selective_scan_fn(
        u, delta, a, b, c, d, z=None, delta_bias=bias, delta_softplus=True, return_last_state=False
    )


class SS2D(nn.Module):
    """2-D selective scan (arXiv 2401.10166, section 4.2): four cross scans of SiLU(DWConv(Linear(x))), merged, normed.

    With a gate, times SiLU(Linear(x)) (arXiv 2402.15648). Shapes: (B, H, W, C) to the same.
    """

    def __init__(self, channels: int, expand: int, scan: Callable[..., Tensor], *, gate: bool):
        super().__init__()
        self.inner, self.scan, self.gate = expand * channels, scan, gate
        self.into = nn.Linear(channels, self.inner * (1 + gate), bias=False)
        self.convolution = nn.Conv2d(self.inner, self.inner, 3, padding=1, groups=self.inner)
        self.selection = Selection(self.inner, scans=4)
        self.norm, self.out = nn.LayerNorm(self.inner), nn.Linear(self.inner, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x, *gate = self.into(x).split(self.inner, dim=-1)
        height, width = x.shape[1:3]
        x = F.silu(self.convolution(x.permute(0, 3, 1, 2).contiguous()))
        sequences = CrossScan.apply(x)
        delta, a, b, c = self.selection(sequences)
        y = self.scan(sequences.flatten(1, 2), delta, a, b, c, self.selection.D, self.selection.dt_bias)
        y = CrossMerge.apply(y.unflatten(1, (4, -1)), height, width)
        y = self.norm(y.transpose(1, 2).unflatten(1, (height, width)))
        return self.out(y * F.silu(gate[0]) if gate else y)


class VMambaBlock(nn.Module):
    """SS2D, then an MLP, each behind a norm and beside a skip (arXiv 2401.10166).

    Shapes: (B, H, W, C) to the same.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.mixer = SS2D(channels, 1, FlexibleScan.apply, gate=False)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class MambaVisionMixer(nn.Module):
    """Mixer (arXiv 2407.08083): Linear(Concat(Scan(σ(Conv(Linear(x)))), σ(Conv(Linear(x))))).

    Half of the channels each; the convolutions are not causal. Shapes: (B, L, C) to the same.
    """

    def __init__(self, channels: int, states: int = 8):
        super().__init__()
        half = channels // 2
        self.norm, self.into, self.out = (
            nn.LayerNorm(channels),
            nn.Linear(channels, channels),
            nn.Linear(channels, channels),
        )
        self.convolutions = nn.ParameterList(torch.randn(half, 1, 3) for _ in range(2))
        self.selection = Selection(half, states=states)

    def forward(self, tokens: Tensor) -> Tensor:
        halves = self.into(self.norm(tokens)).transpose(1, 2).chunk(2, dim=1)
        x, z = (
            F.silu(F.conv1d(half, weight, padding="same", groups=half.shape[1]))
            for half, weight in zip(halves, self.convolutions, strict=True)
        )
        delta, a, b, c = self.selection(x[:, None])
        y = mamba_ssm_scan(x, delta, a, b[:, 0], c[:, 0], self.selection.D.float(), self.selection.dt_bias.float())
        return tokens + self.out(torch.cat((y, z), dim=1).transpose(1, 2))


class ChannelAttention(nn.Module):
    """x times a weight for each channel, from the mean of its map (arXiv 1807.02758)."""

    def __init__(self, channels: int, squeeze: int):
        super().__init__()
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, channels // squeeze, 1),
            nn.ReLU(),
            nn.Conv2d(channels // squeeze, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x)


class MambaIRBlock(nn.Module):
    """Residual state-space block (arXiv 2402.15648): Z = SS2D(LN(x)) + s · x, CA(Conv(LN(Z))) + s′ · Z.

    Tokens and their map's size, as in the authors' network. Shapes: (B, H·W, C) to the same.
    """

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        self.size = (height, width)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.scales = nn.ParameterList(1 + 0.2 * torch.randn(channels) for _ in range(2))
        self.mixer = SS2D(channels, 2, mamba_ssm_scan, gate=True)
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, channels // 3, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(channels // 3, channels, 3, padding=1),
            ChannelAttention(channels, 30),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = tokens.view(tokens.shape[0], *self.size, -1).contiguous()
        z = x * self.scales[0] + self.mixer(self.norms[0](x))
        local = self.convolutions(self.norms[1](z).permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1).contiguous()
        return (z * self.scales[1] + local).view(tokens.shape)


class VSSDBlock(nn.Module):
    """Mamba-2 on a map, behind a norm and beside a skip (arXiv 2407.18559).

    Non-causal: every token sees one state, H = Σ_i Δ_i·|A|·B_i x_iᵀ and y_i = C_i H + D x_i. Causal, as the authors'
    comparison has it: the state-space duality's scan, half of the heads from the end. Shapes: (B, H, W, C) to the same.
    """

    def __init__(self, channels: int, *, causal: bool, head: int = 32, states: int = 64, chunk: int = 64):
        super().__init__()
        self.inner, self.states, self.heads, self.causal, self.chunk = (
            2 * channels,
            states,
            2 * channels // head,
            causal,
            chunk,
        )
        self.norm = nn.LayerNorm(channels)
        self.into = nn.Linear(channels, 2 * self.inner + 2 * states + self.heads, bias=False)
        mixed = self.inner + 2 * states
        self.convolution = nn.Conv2d(mixed, mixed, 3, padding=1, groups=mixed)
        self.dt_bias = nn.Parameter(torch.empty(self.heads).uniform_(-4, 0))
        self.A_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.randn(self.heads))
        self.out_norm, self.out = nn.LayerNorm(self.inner), nn.Linear(self.inner, channels, bias=False)

    def forward(self, map_: Tensor) -> Tensor:
        batch, height, width, _ = map_.shape
        z, xbc, dt = self.into(self.norm(map_)).split((self.inner, self.inner + 2 * self.states, self.heads), dim=-1)
        xbc = F.silu(self.convolution(xbc.permute(0, 3, 1, 2))).flatten(2).transpose(1, 2)
        x, b, c = xbc.split((self.inner, self.states, self.states), dim=-1)
        x, dt = x.unflatten(-1, (self.heads, -1)), F.softplus(dt + self.dt_bias).flatten(1, 2)
        y = (self._scan if self.causal else self._see)(x, dt, -torch.exp(self.A_log), b, c)
        y = self.out_norm(y.reshape(batch, height, width, self.inner)) * z
        return map_ + self.out(y)

    def _see(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        values = x.transpose(1, 2)
        weighted = values * (dt * a.abs()).transpose(1, 2).unsqueeze(-1)
        state = b.transpose(1, 2).unsqueeze(1) @ weighted
        return (c.unsqueeze(1) @ state + values * self.D.view(1, -1, 1, 1)).transpose(1, 2)

    def _scan(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        half, outputs = self.heads // 2, []
        for heads, turn in ((slice(half), lambda t: t), (slice(half, None), lambda t: t.flip([1]))):
            y = mamba_chunk_scan_combined(
                turn(x[:, :, heads]),
                turn(dt[:, :, heads]),
                a[heads],
                turn(b.unsqueeze(2)),
                turn(c.unsqueeze(2)),
                chunk_size=self.chunk,
                D=self.D[heads],
                z=None,
            )
            outputs.append(turn(y))
        return torch.cat(outputs, dim=2)
