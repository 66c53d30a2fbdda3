"""Normalisations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.targets.coreml.mil_ops.base import channelwise, ints, rule


def _affine(x: Tensor, gamma: Tensor | None, beta: Tensor | None) -> Tensor:
    x = x if gamma is None else x * gamma
    return x if beta is None else x + beta


@rule("batch_norm")
def batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """γ (x − mean) / √(variance + ε) + β, per channel."""
    mean, variance = channelwise(mean, x.ndim), channelwise(variance, x.ndim)
    gamma = None if gamma is None else channelwise(gamma, x.ndim)
    beta = None if beta is None else channelwise(beta, x.ndim)
    return _affine((x - mean) / (variance + epsilon).sqrt(), gamma, beta)


@rule("instance_norm")
def instance_norm(
    x: Tensor, gamma: Tensor | None = None, beta: Tensor | None = None, epsilon: Tensor | float = 1e-5
) -> Tensor:
    """Each (sample, channel) map to mean 0 and variance 1, then γ and β per channel."""
    axes = list(range(2, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    gamma = None if gamma is None else channelwise(gamma, x.ndim)
    beta = None if beta is None else channelwise(beta, x.ndim)
    return _affine((x - mean) / (variance + epsilon).sqrt(), gamma, beta)


@rule("layer_norm")
def layer_norm(
    x: Tensor,
    axes: Tensor | None = None,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: Tensor | float = 1e-5,
) -> Tensor:
    """Mean 0 and variance 1 over `axes` (all by default), then γ and β of shape x.shape[axes]."""
    over = sorted(axis % x.ndim for axis in ints(axes)) if axes is not None else list(range(x.ndim))
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    gamma = None if gamma is None else gamma.reshape(shape)
    beta = None if beta is None else beta.reshape(shape)
    return _affine((x - mean) / (variance + epsilon).sqrt(), gamma, beta)


@rule("l2_norm")
def l2_norm(x: Tensor, epsilon: Tensor | float = 1e-6) -> Tensor:
    """x / √(Σ x² + ε) over the last three axes."""
    return x / (x.square().sum((-3, -2, -1), keepdim=True) + epsilon).sqrt()


@rule("local_response_norm")
def local_response_norm(
    x: Tensor, size: Tensor, alpha: Tensor | float = 1e-4, beta: Tensor | float = 0.75, k: Tensor | float = 1.0
) -> Tensor:
    """x / (k + α/size · Σ x²)^β over `size` neighbouring channels."""
    return F.local_response_norm(x, int(size), float(alpha), float(beta), float(k))
