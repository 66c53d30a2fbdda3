"""What each module that a shim stands in for offers, and where mobilemix implements it.

A plain table, read without torch: the implementations are imported when the module that offers them is.
"""

from collections.abc import Mapping

Offer = Mapping[str, str]
"""Public name → `module:attribute` in `mobilemix.shims`."""


def _offer(module: str, *names: str, **renamed: str) -> dict[str, str]:
    return {name: f"{module}:{renamed.get(name, name)}" for name in (*names, *renamed)}


_SELECTIVE_SCAN = _offer("selective_scan", "selective_scan_fn", selective_scan_ref="selective_scan_fn")
_MAMBA_INNER = _offer(
    "selective_scan",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "bimamba_inner_fn",
    mamba_inner_ref="mamba_inner_fn",
    bimamba_inner_ref="bimamba_inner_fn",
)
_LAYER_NORM = _offer(
    "layer_norm",
    "RMSNorm",
    "layer_norm_fn",
    "rms_norm_fn",
    "layer_norm_linear_fn",
    layer_norm_ref="layer_norm_fn",
    rms_norm_ref="rms_norm_fn",
)
_CAUSAL_CONV1D = _offer(
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    causal_conv1d_ref="causal_conv1d_fn",
    causal_conv1d_update_ref="causal_conv1d_update",
)
_SSD = _offer(
    "ssd_combined",
    "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined",
    mamba_split_conv1d_scan_ref="mamba_split_conv1d_scan_combined",
)
_CORE = _offer("extensions", fwd="core_fwd")

MAMBA: Mapping[str, Offer] = {
    "mamba_ssm": {
        **_SELECTIVE_SCAN,
        **_MAMBA_INNER,
        **_offer("mamba", "Mamba"),
        **_offer("mamba2", "Mamba2"),
        **_offer("placeholders", "MambaLMHeadModel"),
    },
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": {**_SELECTIVE_SCAN, **_MAMBA_INNER},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": _LAYER_NORM,
    "mamba_ssm.ops.triton.layernorm": _LAYER_NORM,
    "mamba_ssm.ops.triton.layernorm_gated": _offer(
        "layernorm_gated",
        "LayerNorm",
        "RMSNorm",
        "layernorm_fn",
        "rmsnorm_fn",
        rms_norm_ref="rmsnorm_fn",
    ),
    "mamba_ssm.ops.triton.selective_state_update": _offer(
        "selective_scan", "selective_state_update", selective_state_update_ref="selective_state_update"
    ),
    "mamba_ssm.ops.triton.softplus": _offer("layer_norm", "softplus"),
    "mamba_ssm.ops.triton.ssd_combined": _SSD,
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.block": _offer("block", "Block"),
    "mamba_ssm.modules.mamba_simple": {**_offer("mamba", "Mamba"), **_offer("block", Block="MambaBlock")},
    "mamba_ssm.modules.mamba2": _offer("mamba2", "Mamba2"),
    "mamba_ssm.modules.mamba2_simple": _offer("mamba2", "Mamba2Simple"),
    "mamba_ssm.modules.mlp": _offer("block", "GatedMLP"),
    "mamba_ssm.models": {},
    "mamba_ssm.models.config_mamba": _offer("placeholders", "MambaConfig"),
    "mamba_ssm.models.mixer_seq_simple": _offer("placeholders", "MambaLMHeadModel", "MixerModel"),
    "mamba_ssm.utils": {},
    "mamba_ssm.utils.generation": _offer(
        "placeholders", "GenerationMixin", "InferenceParams", "decode", "update_graph_cache"
    ),
    "mamba_ssm.utils.hf": _offer("placeholders", "load_config_hf", "load_state_dict_hf"),
    "mamba_ssm.utils.torch": _offer("placeholders", "custom_bwd", "custom_fwd"),
    "causal_conv1d": _CAUSAL_CONV1D,
    "causal_conv1d.causal_conv1d_interface": _CAUSAL_CONV1D,
    "causal_conv1d.causal_conv1d_varlen": _offer("placeholders", "causal_conv1d_varlen_states"),
    "causal_conv1d_cuda": _offer("extensions", "causal_conv1d_fwd"),
    "selective_scan": _offer(
        "extensions", selective_scan_fn="selective_scan_without_gate", selective_scan_ref="selective_scan_without_gate"
    ),
    "selective_scan_cuda": _offer("extensions", fwd="mamba_fwd"),
    "selective_scan_cuda_core": _CORE,
    "selective_scan_cuda_nrow": _CORE,
    "selective_scan_cuda_ndstate": _CORE,
    "selective_scan_cuda_oflex": _offer("extensions", fwd="oflex_fwd"),
    "selective_scan_vmamba": _offer("extensions", selective_scan_cuda_core="core"),
    "selective_scan_vmamba_pt202": _offer("extensions", selective_scan_cuda_core="core"),
    "csms6s": _offer("cross_scan", "CrossMerge", "CrossScan", "selective_scan_fn", "cross_merge_fn", "cross_scan_fn")
    | _offer("placeholders", "flops_selective_scan_fn", "selective_scan_flop_jit"),
    "csm_triton": _offer(
        "cross_scan",
        "CrossMerge",
        "CrossScan",
        "cross_merge_fn",
        "cross_scan_fn",
        "getCSM",
        CrossMergeTriton="CrossMerge",
        CrossScanTriton="CrossScan",
    ),
    "mamba2": {},
    "mamba2.ssd_minimal": _offer("ssd_combined", "selective_scan_chunk_fn"),
}

TRITON = "triton"
"""Its stub offers any name, in any submodule."""

_LANGUAGE = (
    "mamba_ssm.models",
    "mamba_ssm.models.mixer_seq_simple",
    "mamba_ssm.utils.generation",
    "mamba_ssm.utils.hf",
)
"""What mamba_ssm imports for its language models, and breaks with newer releases of transformers."""

NEEDS: Mapping[str, str] = {
    **{name: TRITON for name in MAMBA if name.startswith("mamba_ssm.ops.triton.") or name in _LANGUAGE},
    **{name: "causal_conv1d_cuda" for name in MAMBA if name.partition(".")[0] == "causal_conv1d"},
}
"""Module → what it cannot run without: where that is stood in for, so is the module, even if it is there."""

GPU_ONLY = frozenset(
    {name for name in MAMBA if "_cuda" in name} | {"selective_scan_vmamba", "selective_scan_vmamba_pt202"}
)
"""Compiled extensions, which refuse tensors on the CPU: stood in for even where they are installed."""

FILES = frozenset({"csm_triton", "csms6s", "mamba2", "selective_scan"})
"""Names that files of repositories have, too: those are used unseen, not imported to see whether they can be."""

SHIMS: Mapping[str, tuple[str, ...]] = {
    # Extensions before the packages that import them.
    "mamba": (TRITON, *sorted({name.partition(".")[0] for name in MAMBA}, key=lambda name: ("cuda" not in name, name))),
    "triton": (TRITON,),
}
"""Shim → the top-level packages that it stands in for."""
