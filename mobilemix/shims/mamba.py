"""mamba_ssm.modules.mamba_simple.Mamba (Gu and Dao, arXiv 2312.00752), with the directions that its forks add."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mobilemix.errors import UnknownNameError, UnsupportedOpError
from mobilemix.shims.selective_scan import bimamba_inner_fn, mamba_inner_fn_no_out_proj

DIRECTIONS = {
    "none": ("",),
    "v1": ("",),  # backwards with a decay of its own, and everything else shared
    "v2": ("", "_b"),  # backwards with weights of its own
    "v3": ("", "_b", "_s"),  # and across slices: the n-th steps of all slices first
}
"""bimamba_type → suffixes of the parameters of each scan."""


class Mamba(nn.Module):
    """A Mamba layer, (b, l, model) to (b, l, model).

    State, with d = expand·d_model: in_proj.weight (2d, model), conv1d.weight (d, 1, d_conv), conv1d.bias (d,),
    x_proj.weight (dt_rank + 2·d_state, d), dt_proj.weight (d, dt_rank), dt_proj.bias (d,), A_log (d, d_state), D (d,),
    out_proj.weight (model, d); of each further direction conv1d, x_proj, dt_proj, A_log and D with the suffix b
    (backwards; A_b_log, D_b) or s (across slices). Vision Mamba's fork has bimamba_type, VideoMamba's bimamba,
    SegMamba's nslices.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,  # noqa: ARG002 -- there is one path
        layer_idx: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        bimamba: bool = False,
        nslices: int = 5,
    ) -> None:
        """As mamba_ssm and its forks; `use_fast_path` has no effect.

        Raises:
            UnknownNameError: bimamba_type.
        """
        super().__init__()
        kind = "v2" if bimamba else bimamba_type
        if kind not in DIRECTIONS:
            raise UnknownNameError("bimamba_type", kind, DIRECTIONS)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        self.layer_idx = layer_idx
        self.bimamba_type = kind
        self.if_divide_out = if_divide_out
        self.init_layer_scale = init_layer_scale
        self.nslices = nslices
        self.activation = "silu"
        self.act = nn.SiLU()
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **where)
        for suffix in DIRECTIONS[kind]:
            convolution = depthwise(self.d_inner, d_conv, conv_bias, **where)
            step = nn.Linear(self.dt_rank, self.d_inner, bias=True, **where)
            spread = self.dt_rank**-0.5 * dt_scale
            with torch.no_grad():
                step.weight.fill_(spread) if dt_init == "constant" else step.weight.uniform_(-spread, spread)
                step.bias.copy_(step_bias(self.d_inner, dt_min, dt_max, dt_init_floor))
            self.add_module(f"conv1d{suffix}", convolution)
            self.add_module(f"x_proj{suffix}", nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **where))
            self.add_module(f"dt_proj{suffix}", step)
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(self.d_inner, device=device)))
        for suffix in ("", "_b") if kind == "v1" else DIRECTIONS[kind]:
            decay = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).log()
            self.register_parameter(f"A{suffix}_log", nn.Parameter(decay.repeat(self.d_inner, 1)))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **where)
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), init_layer_scale))

    def forward(self, hidden_states: Tensor, inference_params: Any = None, **_: Any) -> Tensor:
        """Mix the tokens.

        Raises:
            UnsupportedOpError: step-by-step decoding.
        """
        refuse_decoding(inference_params)
        xz = self.in_proj(hidden_states).mT
        if self.bimamba_type == "v1":
            y = self._both_ways(xz)
        else:
            total = self._scan(xz, "")
            if self.bimamba_type in ("v2", "v3"):
                total = total + self._scan(xz.flip(-1), "_b").flip(-1)
            if self.bimamba_type == "v3":
                slices = torch.unflatten(xz, -1, (self.nslices, -1)).mT.flatten(-2)
                total = total + torch.unflatten(self._scan(slices, "_s"), -1, (-1, self.nslices)).mT.flatten(-2)
            y = self.out_proj((total / 2 if self.if_divide_out else total).mT)
        return y if self.init_layer_scale is None else y * self.gamma

    def _scan(self, xz: Tensor, suffix: str) -> Tensor:
        own: dict[str, Any] = {name: getattr(self, name + suffix) for name in ("conv1d", "x_proj", "dt_proj", "D")}
        return mamba_inner_fn_no_out_proj(
            xz,
            own["conv1d"].weight,
            own["conv1d"].bias,
            own["x_proj"].weight,
            own["dt_proj"].weight,
            -torch.exp(getattr(self, f"A{suffix}_log")),
            D=own["D"],
            delta_bias=own["dt_proj"].bias,
        )

    def _both_ways(self, xz: Tensor) -> Tensor:
        own: Any = self  # its parameters are registered by name
        return bimamba_inner_fn(
            xz,
            own.conv1d.weight,
            own.conv1d.bias,
            own.x_proj.weight,
            own.dt_proj.weight,
            own.out_proj.weight,
            own.out_proj.bias,
            -torch.exp(own.A_log),
            -torch.exp(own.A_b_log),
            D=own.D,
            delta_bias=own.dt_proj.bias,
        )


def refuse_decoding(inference_params: Any) -> None:
    """The state of decoding lives outside of a captured graph."""
    if inference_params is not None:
        raise UnsupportedOpError("mobilemix's Mamba layers take whole sequences; leave inference_params out")


def depthwise(
    channels: int, width: int, bias: bool, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Conv1d:
    """The causal convolution's weights, (channels, 1, width)."""
    return nn.Conv1d(
        channels, channels, width, groups=channels, padding=width - 1, bias=bias, device=device, dtype=dtype
    )


def step_bias(size: int, least: float, most: float, floor: float) -> Tensor:
    """A bias of which the softplus is log-uniform in [least, most], but at least `floor`."""
    steps = torch.empty(size).uniform_(math.log(least), math.log(most)).exp().clamp(min=floor)
    return steps + torch.log(-torch.expm1(-steps))
