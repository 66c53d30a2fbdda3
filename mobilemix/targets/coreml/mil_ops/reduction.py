"""Reductions over axes, and the classifier's head."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mobilemix.targets.coreml.mil_ops.base import ints, named, rule

Reduce = Callable[[Tensor, list[int]], Tensor]


def _prod(x: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True)
    return x


REDUCTIONS: dict[str, Reduce] = {
    "reduce_l1_norm": lambda x, axes: x.abs().sum(axes, keepdim=True),
    "reduce_l2_norm": lambda x, axes: x.square().sum(axes, keepdim=True).sqrt(),
    "reduce_log_sum": lambda x, axes: x.sum(axes, keepdim=True).log(),
    "reduce_log_sum_exp": lambda x, axes: x.logsumexp(axes, keepdim=True),
    "reduce_max": lambda x, axes: x.amax(axes, keepdim=True),
    "reduce_mean": lambda x, axes: x.mean(axes, keepdim=True),
    "reduce_min": lambda x, axes: x.amin(axes, keepdim=True),
    "reduce_prod": _prod,
    "reduce_sum": lambda x, axes: x.sum(axes, keepdim=True),
    "reduce_sum_square": lambda x, axes: x.square().sum(axes, keepdim=True),
}


def _over_axes(reduce: Reduce) -> Callable[..., Tensor]:
    def compute(x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | bool = False) -> Tensor:
        over = [axis % x.ndim for axis in ints(axes)] if axes is not None else list(range(x.ndim))
        reduced = reduce(x, over)
        return reduced if keep_dims else reduced.squeeze(over)

    return compute


for _type, _reduce in REDUCTIONS.items():
    rule(_type)(_over_axes(_reduce))


@rule("reduce_argmax", result=named("output_dtype", "int32"))
def reduce_argmax(
    x: Tensor,
    axis: Tensor | int = -1,
    keep_dims: Tensor | bool = False,
    output_dtype: str = "int32",  # noqa: ARG001 the executor applies it
) -> Tensor:
    """Where the maximum is."""
    return x.argmax(int(axis), keepdim=bool(keep_dims))


@rule("reduce_argmin", result=named("output_dtype", "int32"))
def reduce_argmin(
    x: Tensor,
    axis: Tensor | int = -1,
    keep_dims: Tensor | bool = False,
    output_dtype: str = "int32",  # noqa: ARG001
) -> Tensor:
    """Where the minimum is."""
    return x.argmin(int(axis), keepdim=bool(keep_dims))


@rule("classify", result=lambda *_: None)
def classify(probabilities: Tensor, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most probable label, and the probabilities in the order of the labels."""
    flat = probabilities.flatten()
    if flat.numel() != len(classes):
        raise ValueError(f"{flat.numel()} probabilities for {len(classes)} classes")
    return np.asarray(classes[int(torch.argmax(flat))]), flat.detach().numpy()
