"""Evaluation-mode batch norm folded into the convolution or linear map beside it."""

import dataclasses

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments
from mobilemix.passes.editing import Edit, bias_name

aten = torch.ops.aten

_CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default),
    *(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding),
)
_TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
_LINEAR = (aten.linear.default,)
_EITHER = aten.convolution.default
"""A convolution or a transposed one, as decompositions leave both."""
_BATCH_NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)


class FoldBatchNorm(Pass):
    """Fold batch norm into the linear map before it, or into the one after it.

    A batch norm in evaluation mode is x·s + t per channel, s = weight / √(running_var + eps), t = bias − mean·s.

        before:  x (N, C, H, W) → conv2d w (K, C, h, w), b (K) → batch_norm (K) → y (N, K, H', W')
        after:   x (N, C, H, W) → conv2d w·s (K, C, h, w), b·s + t (K) → y (N, K, H', W')

        before:  x (N, C, H, W) → batch_norm (C) → conv2d w (K, C, h, w), b (K), no padding → y (N, K, H', W')
        after:   x (N, C, H, W) → conv2d w·s (K, C, h, w), b + Σ w·t (K) → y (N, K, H', W')

    The same for conv1d, conv3d, their transposes (batch norm after) and linear. The value between the two must have no
    other user. With padding, a batch norm that comes before is kept: the pixels of the border would need another bias.
    Folding is computed in float64 and rounded once.
    """

    name = "fold_batch_norm"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without the batch norms that stand beside a linear map."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            norm = _batch_norm(edit, node)
            if norm is None:
                continue
            linear = norm.input
            if _is_foldable(edit, linear) and len(linear.users) == 1:
                with edit.at(node):
                    edit.replace(norm.output, _scale_output(edit, linear, norm))
                continue
            users = list(norm.output.users)
            if len(users) == 1 and _is_foldable(edit, users[0]) and _sees_no_border(users[0]):
                with edit.at(users[0]):
                    edit.replace(users[0], _scale_input(edit, users[0], norm))
        return edit.finish()


@dataclasses.dataclass(frozen=True)
class _BatchNorm:
    """output = input · scale + shift per channel; float64 tensors of shape (C,)."""

    input: fx.Node
    output: fx.Node
    scale: Tensor
    shift: Tensor


def _batch_norm(edit: Edit, node: fx.Node) -> _BatchNorm | None:
    if node.target not in _BATCH_NORMS or not node.users:
        return None
    # The decomposed form returns a tuple, of which inference uses the first item alone.
    output = node if node.target is aten.batch_norm.default else next(iter(node.users))
    values = arguments(node)
    mean, variance, weight, bias = (
        edit.constant(values[name]) for name in ("running_mean", "running_var", "weight", "bias")
    )
    if mean is None or variance is None or values.get("training", False):
        return None
    scale = (variance.double() + values["eps"]).rsqrt() * (1.0 if weight is None else weight.double())
    shift = (0.0 if bias is None else bias.double()) - mean.double() * scale
    return _BatchNorm(values["input"], output, scale, shift)


def _is_foldable(edit: Edit, node: fx.Node) -> bool:
    """A linear map whose weights are constant and whose channels are where batch norm has them."""
    if node.target in _LINEAR:
        if node.meta["val"].dim() != 2:
            return False
    elif not _convolves(node) and not _is_transposed(node):
        return False
    values = arguments(node)
    return all(values[name] is None or edit.constant(values[name]) is not None for name in ("weight", "bias"))


def _convolves(node: fx.Node) -> bool:
    return node.target in _CONVOLUTIONS or (node.target is _EITHER and not arguments(node)["transposed"])


def _is_transposed(node: fx.Node) -> bool:
    return node.target in _TRANSPOSED or (node.target is _EITHER and arguments(node)["transposed"])


def _sees_no_border(node: fx.Node) -> bool:
    """Whether every output sees the same number of inputs, so that shifting these shifts all outputs alike."""
    return node.target in _LINEAR or (_convolves(node) and not any(arguments(node)["padding"]))


def _scale_output(edit: Edit, node: fx.Node, norm: _BatchNorm) -> fx.Node:
    weight, bias = _parameters(edit, node)
    if _is_transposed(node):  # (C, K / groups, ...): output channels are spread over both of the first axes
        groups = arguments(node)["groups"]
        scale = norm.scale.reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
        scale = scale.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    else:
        scale = norm.scale.reshape(-1, *[1] * (weight.dim() - 1))
    return _with_parameters(edit, node, weight * scale, bias * norm.scale + norm.shift)


def _scale_input(edit: Edit, node: fx.Node, norm: _BatchNorm) -> fx.Node:
    weight, bias = _parameters(edit, node)
    groups = arguments(node).get("groups", 1)
    per_output = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    scale, shift = (value.reshape(groups, 1, -1, 1) for value in (norm.scale, norm.shift))
    bias = bias + (per_output * shift).sum((2, 3)).flatten()
    scaled = _with_parameters(edit, node, (per_output * scale).reshape(weight.shape), bias)
    scaled.replace_input_with(norm.output, norm.input)
    return scaled


def _parameters(edit: Edit, node: fx.Node) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64, the bias zero where there is none."""
    values = arguments(node)
    weight, bias = edit.constant(values["weight"]), edit.constant(values["bias"])
    assert weight is not None
    return weight.double(), torch.zeros((), dtype=torch.float64) if bias is None else bias.double()


def _with_parameters(edit: Edit, node: fx.Node, weight: Tensor, bias: Tensor) -> fx.Node:
    name, dtype = edit.name(arguments(node)["weight"]), node.meta["val"].dtype
    return edit.emit_like(
        node,
        weight=edit.add_constant(name, weight.to(dtype)),
        bias=edit.add_constant(bias_name(name), bias.to(dtype)),
    )
