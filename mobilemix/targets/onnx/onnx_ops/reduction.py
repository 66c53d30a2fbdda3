"""Reductions, softmax and normalisations: statistics along axes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.targets.onnx.onnx_ops.base import channelwise, every, rule


def _product(x: Tensor, axes: list[int], keepdim: bool) -> Tensor:
    for axis in reversed(axes):
        x = x.prod(axis, keepdim=keepdim)
    return x


REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMax": torch.amax,
    "ReduceMean": torch.mean,
    "ReduceMin": torch.amin,
    "ReduceProd": _product,
    "ReduceSum": torch.sum,
}


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Callable[..., Tensor]:
    def compute(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        if noop_with_empty_axes and (axes is None or not axes.numel()):
            return x
        return function(x, every(axes, x.ndim), bool(keepdims))

    return compute


for _type, _function in REDUCTIONS.items():
    rule(_type)(_reduction(_function))


@rule("ArgMax")
def argmax(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Place of the largest number, the first of several or the last."""
    if select_last_index:
        return x.shape[axis] - 1 - x.flip(axis).argmax(axis, keepdim=bool(keepdims))
    return x.argmax(axis, keepdim=bool(keepdims))


@rule("Softmax")
def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """exp(x) / Σ exp(x)."""
    return x.softmax(axis)


@rule("LogSoftmax")
def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """x − log Σ exp(x)."""
    return x.log_softmax(axis)


@rule("LayerNormalization")
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,  # noqa: ARG001, the working dtype is the only one
) -> Tensor:
    """Zero mean and unit variance over the axes from `axis` on, then the affine map."""
    normalised = F.layer_norm(x, x.shape[axis % x.ndim :], eps=epsilon) * scale
    return normalised if bias is None else normalised + bias


@rule("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Zero mean and unit variance of each sample's channel, then the affine map of channels."""
    normalised = F.layer_norm(x, x.shape[2:], eps=epsilon)
    return normalised * channelwise(scale, x.ndim) + channelwise(bias, x.ndim)


@rule("GroupNormalization")
def group_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: int = 1,  # noqa: ARG001, the working dtype is the only one
) -> Tensor:
    """Zero mean and unit variance of each sample's groups; scale and bias of groups (opset 18) or channels (21)."""
    if scale.numel() != x.shape[1]:
        scale, bias = (each.repeat_interleave(x.shape[1] // num_groups) for each in (scale, bias))
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@rule("BatchNormalization")
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,  # noqa: ARG001, of training
) -> Tensor:
    """(x − μ) / √(σ² + ε) by channel, then the affine map."""
    factor = scale / (variance + epsilon).sqrt()
    return channelwise(factor, x.ndim) * (x - channelwise(mean, x.ndim)) + channelwise(bias, x.ndim)
