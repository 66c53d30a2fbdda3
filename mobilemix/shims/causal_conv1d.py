"""causal_conv1d: a depthwise convolution that sees only the past, and its update by one or more steps."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.errors import UnsupportedOpError

_ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | str | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """Convolve each channel with the `width` steps up to each one.

    Args:
        x: (b, d, l).
        weight: (d, width).
        bias: (d,).
        seq_idx: sequences packed into one; not supported.
        initial_states: the steps before, (b, d, width - 1); None is zeros.
        return_final_states: return (y, the last width - 1 steps of x).
        final_states_out: written to as well.
        activation: None, "silu" or "swish".

    Raises:
        UnsupportedOpError: seq_idx is given, or another activation.
    """
    # The first releases took the activation where seq_idx is now.
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    if seq_idx is not None:
        raise UnsupportedOpError("mobilemix's causal_conv1d_fn takes one sequence per batch item; drop seq_idx")
    width = weight.shape[-1]
    padded = F.pad(x, (width - 1, 0)) if initial_states is None else torch.cat([initial_states.to(x.dtype), x], -1)
    y = _activate(F.conv1d(padded, weight.unsqueeze(1).to(x.dtype), _like(bias, x), groups=x.shape[1]), activation)
    if not return_final_states:
        return y
    final = padded[..., padded.shape[-1] - (width - 1) :]
    return y, final if final_states_out is None else final_states_out.copy_(final)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next steps, (b, d) or (b, d, l); `conv_state`, (b, d, ≥ width - 1), moves on in place.

    Raises:
        UnsupportedOpError: a circular or indexed state, or an activation other than silu.
    """
    if cache_seqlens is not None or conv_state_indices is not None:
        raise UnsupportedOpError("mobilemix's causal_conv1d_update takes no cache_seqlens or conv_state_indices")
    steps = x.unsqueeze(-1) if x.dim() == 2 else x
    history = torch.cat([conv_state.to(x.dtype), steps], -1)
    conv_state.copy_(history[..., steps.shape[-1] :])
    y = F.conv1d(history, weight.unsqueeze(1).to(x.dtype), _like(bias, x), groups=steps.shape[1])
    y = _activate(y[..., y.shape[-1] - steps.shape[-1] :], activation)
    return y.squeeze(-1) if x.dim() == 2 else y


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _activate(y: Tensor, activation: str | None) -> Tensor:
    if activation not in _ACTIVATIONS:
        raise UnsupportedOpError(f"causal_conv1d takes the activation None, 'silu' or 'swish', not {activation!r}")
    return y if activation is None else F.silu(y)
