"""Linear maps and convolutions with constant weights, and the same followed or preceded by a scale and shift."""

import torch
from torch import Tensor, fx

from mobilemix.passes.base import arguments, node_shape
from mobilemix.passes.editing import Edit, bias_name

aten = torch.ops.aten

LINEAR = aten.linear.default
_CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_EITHER = aten.convolution.default
"""A convolution or a transposed one, as decompositions leave both."""

_HALF_RANGE = 2.0**13
"""Weights that are folded stay below, three bits under the largest number of float16, unless they were beyond it."""


def is_convolution(node: fx.Node) -> bool:
    """Whether a node is a convolution, not a transposed one."""
    return node.target in _CONVOLUTIONS or (node.target is _EITHER and not arguments(node)["transposed"])


def _is_transposed(node: fx.Node) -> bool:
    return node.target in _TRANSPOSED or (node.target is _EITHER and bool(arguments(node)["transposed"]))


def is_map(edit: Edit, node: fx.Node) -> bool:
    """Whether a node is a linear map or a convolution of a batch, with constant weights."""
    if node.target is not LINEAR and not is_convolution(node) and not _is_transposed(node):
        return False
    values = arguments(node)
    if any(values[name] is not None and edit.constant(values[name]) is None for name in ("weight", "bias")):
        return False
    return node.target is LINEAR or len(node_shape(node)) == len(node_shape(values["weight"]))


def channel_axis(node: fx.Node) -> int:
    """The axis of the channels, in the input and in the output of a map."""
    return len(node_shape(node)) - 1 if node.target is LINEAR else 1


def sees_no_border(node: fx.Node) -> bool:
    """Whether every output sees the same number of inputs, so that shifting these shifts all outputs alike."""
    return node.target is LINEAR or (is_convolution(node) and not any(arguments(node)["padding"]))


def parameters(edit: Edit, node: fx.Node) -> tuple[Tensor, Tensor]:
    """Weight and bias (channels,) in float64, the bias zero where there is none."""
    values = arguments(node)
    weight, bias = edit.constant(values["weight"]), edit.constant(values["bias"])
    assert weight is not None
    channels = node_shape(node)[channel_axis(node)]
    return weight.double(), torch.zeros(channels, dtype=torch.float64) if bias is None else bias.double()


def with_parameters(edit: Edit, node: fx.Node, weight: Tensor, bias: Tensor, **changes: object) -> fx.Node:
    """The call of `node` with another weight and bias, rounded to its dtype; without a bias if that is zero."""
    name, dtype = edit.name(arguments(node)["weight"]), node.meta["val"].dtype
    has_bias = arguments(node)["bias"] is not None or bool(bias.any())
    return edit.emit_like(
        node,
        weight=edit.add_constant(name, weight.to(dtype)),
        bias=edit.add_constant(bias_name(name), bias.to(dtype)) if has_bias else None,
        **changes,
    )


def output_scaled(edit: Edit, node: fx.Node, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters of the map whose output is that of `node` times scale (channels,) plus shift (channels,)."""
    weight, bias = parameters(edit, node)
    if _is_transposed(node):  # (C, K / groups, ...): output channels are spread over both of the first axes
        groups = arguments(node)["groups"]
        factor = scale.expand(len(bias)).reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
        factor = factor.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    else:
        factor = scale.expand(len(bias)).reshape(-1, *[1] * (weight.dim() - 1))
    return weight * factor, bias * scale + shift


def input_scaled(edit: Edit, node: fx.Node, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Parameters of the map, no transposed one, that makes of x what `node` makes of x times scale plus shift."""
    weight, bias = parameters(edit, node)
    groups = arguments(node).get("groups", 1)
    channels = groups * weight.shape[1]
    per_output = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    scale, shift = (value.expand(channels).reshape(groups, 1, -1, 1) for value in (scale, shift))
    bias = bias + (per_output * shift).sum((2, 3)).flatten()
    return (per_output * scale).reshape(weight.shape), bias


def fits_half(before: Tensor, after: Tensor) -> bool:
    """Whether folding leaves weights as far from the end of float16's range as they were, or far enough."""
    return bool(after.isfinite().all()) and float(after.abs().max()) <= max(float(before.abs().max()), _HALF_RANGE)
