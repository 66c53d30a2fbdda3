"""Constants that scale and shift the channels of a value."""

import dataclasses

import torch
from torch import Tensor, fx

from mobilemix.passes.base import arguments
from mobilemix.passes.editing import Edit

aten = torch.ops.aten

_BATCH_NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)


@dataclasses.dataclass(frozen=True)
class Affine:
    """output = input · scale + shift, with one number for each entry of an axis.

    Attributes:
        input: a value.
        output: another of the same shape.
        axis: the axis that the numbers go along; None where there is one for all.
        scale: float64 (n,), or () where the axis is None.
        shift: like it.
    """

    input: fx.Node
    output: fx.Node
    axis: int | None
    scale: Tensor
    shift: Tensor

    def along(self, axis: int, size: int) -> "Affine":
        """The same with one number for each entry of `axis`."""
        assert self.axis in (None, axis)
        return dataclasses.replace(
            self, axis=axis, scale=self.scale.expand(size).clone(), shift=self.shift.expand(size).clone()
        )


def affine(edit: Edit, node: fx.Node) -> Affine | None:
    """What a node does, if it multiplies by constants or adds them, or is a batch norm in evaluation mode."""
    if node.target in _BATCH_NORMS:
        return batch_norm(edit, node)
    if node.target not in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor):
        return None
    x, other = node.args
    if not isinstance(x, fx.Node) or edit.constant(x) is not None:
        if node.target is aten.div.Tensor:
            return None
        x, other, swapped = other, x, True
    else:
        swapped = False
    value = _number(edit, other)
    if not isinstance(x, fx.Node) or value is None or edit.constant(x) is not None:
        return None
    before, after = x.meta["val"], node.meta["val"]
    if before.shape != after.shape or before.dtype != after.dtype or not after.is_floating_point():
        return None
    axes = [axis for axis, size in enumerate(value.shape, after.dim() - value.dim()) if size != 1]
    if len(axes) > 1:
        return None
    numbers = value.flatten() if axes else value.reshape(())
    one, zero = torch.ones_like(numbers), torch.zeros_like(numbers)
    alpha = float(arguments(node).get("alpha", 1))
    if node.target is aten.mul.Tensor:
        scale, shift = numbers, zero
    elif node.target is aten.div.Tensor:
        scale, shift = 1 / numbers, zero
    elif swapped:  # number ± alpha · x
        scale, shift = (alpha if node.target is aten.add.Tensor else -alpha) * one, numbers
    else:  # x ± alpha · number
        scale, shift = one, (alpha if node.target is aten.add.Tensor else -alpha) * numbers
    return Affine(x, node, axes[0] if axes else None, scale, shift)


def batch_norm(edit: Edit, node: fx.Node) -> Affine | None:
    """What a batch norm in evaluation mode does; the decomposed one returns a tuple, whose first item is the output."""
    if node.target not in _BATCH_NORMS or not node.users:
        return None
    values = arguments(node)
    output = node if node.target is aten.batch_norm.default else next(iter(node.users))
    mean, variance, weight, bias = (
        edit.constant(values[name]) for name in ("running_mean", "running_var", "weight", "bias")
    )
    if mean is None or variance is None or values.get("training", False):
        return None
    scale = (variance.double() + values["eps"]).rsqrt() * (1.0 if weight is None else weight.double())
    shift = (0.0 if bias is None else bias.double()) - mean.double() * scale
    return Affine(values["input"], output, 1, scale, shift)


def _number(edit: Edit, value: object) -> Tensor | None:
    """A constant as float64."""
    if isinstance(value, int | float):
        return torch.tensor(float(value), dtype=torch.float64)
    tensor = edit.constant(value)
    return None if tensor is None else tensor.double()
