"""Names of mamba_ssm that vision repositories import beside the ones they use."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mobilemix.errors import UnsupportedOpError


def _unavailable(name: str) -> Any:
    def refuse(*arguments: object, **options: object) -> Any:  # noqa: ARG001
        raise UnsupportedOpError(f"mobilemix's stand-in for mamba_ssm has {name} for the import only")

    refuse.__name__ = name
    return refuse


MambaLMHeadModel = _unavailable("MambaLMHeadModel")
MixerModel = _unavailable("MixerModel")
causal_conv1d_varlen_states = _unavailable("causal_conv1d_varlen_states")
decode = _unavailable("decode")
flops_selective_scan_fn = _unavailable("flops_selective_scan_fn")
load_config_hf = _unavailable("load_config_hf")
load_state_dict_hf = _unavailable("load_state_dict_hf")
selective_scan_flop_jit = _unavailable("selective_scan_flop_jit")
update_graph_cache = _unavailable("update_graph_cache")


class GenerationMixin:
    """A base class without `generate`."""


@dataclasses.dataclass
class InferenceParams:
    """State of step-by-step decoding."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Any] = dataclasses.field(default_factory=dict)
    lengths_per_sample: Tensor | None = None


@dataclasses.dataclass
class MambaConfig:
    """Configuration of the language models."""

    d_model: int = 2560
    d_intermediate: int = 0
    n_layer: int = 64
    vocab_size: int = 50277
    ssm_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    attn_layer_idx: list[int] = dataclasses.field(default_factory=list)
    attn_cfg: dict[str, Any] = dataclasses.field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    fused_add_norm: bool = True
    pad_vocab_size_multiple: int = 8
    tie_embeddings: bool = True


custom_fwd = torch.amp.custom_fwd(device_type="cuda")
custom_bwd = torch.amp.custom_bwd(device_type="cuda")
