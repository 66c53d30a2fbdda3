"""mamba_ssm.modules.mamba2 and mamba2_simple (Dao and Gu, arXiv 2405.21060)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from mobilemix.errors import UnsupportedOpError
from mobilemix.shims.layernorm_gated import RMSNorm
from mobilemix.shims.mamba import depthwise, refuse_decoding, step_bias
from mobilemix.shims.ssd_combined import mamba_split_conv1d_scan_combined


class Mamba2(nn.Module):
    """A Mamba-2 layer, (b, l, model) to (b, l, model).

    State, with d = expand·d_model, s = d_ssm or d, h = s/headdim: in_proj.weight (2d + 2·ngroups·d_state + h, model),
    conv1d.weight (s + 2·ngroups·d_state, 1, d_conv) and bias, dt_bias, A_log (h,), D (h,) or (s,), norm.weight (s,),
    out_proj.weight (model, d).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 64,
        d_ssm: int | None = None,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        D_has_hdim: bool = False,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,  # noqa: ARG002 -- there is one path
        layer_idx: int | None = None,
        process_group: Any = None,
        sequence_parallel: bool = True,  # noqa: ARG002 -- of process groups
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As mamba_ssm; `use_mem_eff_path` has no effect.

        Raises:
            UnsupportedOpError: a process group.
        """
        super().__init__()
        if process_group is not None:
            raise UnsupportedOpError("mobilemix's Mamba2 runs in one process; leave process_group out")
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = expand * d_model
        self.d_ssm = self.d_inner if d_ssm is None else d_ssm
        self.headdim, self.ngroups = headdim, ngroups
        self.nheads = self.d_ssm // headdim
        self.D_has_hdim, self.rmsnorm, self.norm_before_gate = D_has_hdim, rmsnorm, norm_before_gate
        self.dt_limit, self.chunk_size, self.layer_idx = dt_limit, chunk_size, layer_idx
        self.activation = "silu"
        self.act = nn.SiLU()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        channels = self.d_ssm + 2 * ngroups * d_state
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + 2 * ngroups * d_state + self.nheads, bias=bias, **where)
        self.conv1d = depthwise(channels, d_conv, conv_bias, **where)
        if conv_init is not None:
            nn.init.uniform_(self.conv1d.weight, -conv_init, conv_init)
        self.dt_bias = nn.Parameter(step_bias(self.nheads, dt_min, dt_max, dt_init_floor).to(**where))
        self.A_log = nn.Parameter(torch.empty(self.nheads).uniform_(*A_init_range).log().to(**where))
        self.D = nn.Parameter(torch.ones(self.d_ssm if D_has_hdim else self.nheads, device=device))
        if rmsnorm:
            self.norm = RMSNorm(
                self.d_ssm, 1e-5, group_size=self.d_ssm // ngroups, norm_before_gate=norm_before_gate, **where
            )
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **where)

    def forward(
        self,
        u: Tensor,
        seqlen: int | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        inference_params: Any = None,
    ) -> Tensor:
        """Mix the tokens; with `seqlen`, u is (b·l, model).

        Raises:
            UnsupportedOpError: step-by-step decoding, or sequences packed into one.
        """
        refuse_decoding(inference_params)
        if cu_seqlens is not None:
            raise UnsupportedOpError("mobilemix's Mamba2 takes one sequence per batch item; drop cu_seqlens")
        y = self._mix(self.in_proj(u if seqlen is None else torch.unflatten(u, 0, (-1, seqlen))), seq_idx, None)
        return y if seqlen is None else y.flatten(0, 1)

    def _mix(self, projected: Tensor, seq_idx: Tensor | None, initial_states: Tensor | None) -> Tensor:
        y = mamba_split_conv1d_scan_combined(
            projected,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            -torch.exp(self.A_log),
            torch.unflatten(self.D, 0, (-1, self.headdim)) if self.D_has_hdim else self.D,
            self.chunk_size,
            initial_states,
            seq_idx,
            self.dt_limit,
            rmsnorm_weight=self.norm.weight if self.rmsnorm else None,
            rmsnorm_eps=self.norm.eps if self.rmsnorm else 1e-6,
            outproj_weight=self.out_proj.weight,
            outproj_bias=self.out_proj.bias,
            headdim=self.headdim,
            ngroups=self.ngroups,
            norm_before_gate=self.norm_before_gate,
        )
        assert isinstance(y, Tensor)
        return y


class Mamba2Simple(Mamba2):
    """The same with fewer options, other defaults, one norm over all groups, and states to begin with.

    State: also init_states (h, headdim, d_state) with `learnable_init_states`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        conv_init: float | None = None,
        expand: int = 2,
        headdim: int = 128,
        ngroups: int = 1,
        A_init_range: tuple[float, float] = (1, 16),
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        learnable_init_states: bool = False,
        activation: str = "swish",
        bias: bool = False,
        conv_bias: bool = True,
        chunk_size: int = 256,
        use_mem_eff_path: bool = True,  # noqa: ARG002 -- there is one path
        layer_idx: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """As mamba_ssm; `use_mem_eff_path` has no effect."""
        super().__init__(
            d_model,
            d_state,
            d_conv,
            conv_init,
            expand,
            headdim,
            ngroups=ngroups,
            A_init_range=A_init_range,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_init_floor=dt_init_floor,
            dt_limit=dt_limit,
            bias=bias,
            conv_bias=conv_bias,
            chunk_size=chunk_size,
            layer_idx=layer_idx,
            device=device,
            dtype=dtype,
        )
        self.activation = activation
        self.learnable_init_states = learnable_init_states
        if learnable_init_states:
            self.init_states = nn.Parameter(torch.zeros(self.nheads, headdim, d_state, device=device, dtype=dtype))

    def forward(self, u: Tensor, seq_idx: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Mix the tokens."""
        states = self.init_states.expand(len(u), -1, -1, -1) if self.learnable_init_states else None
        return self._mix(self.in_proj(u), seq_idx, states)
