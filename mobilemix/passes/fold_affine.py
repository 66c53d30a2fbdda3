"""Scales and shifts of channels folded into the linear maps that read them."""

import dataclasses

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mobilemix.passes.axes import axis_after, only_moves
from mobilemix.passes.base import Pass, PassResult, arguments, node_shape
from mobilemix.passes.channels import Affine, affine
from mobilemix.passes.editing import Edit
from mobilemix.passes.maps import (
    LINEAR,
    channel_axis,
    fits_half,
    input_scaled,
    is_convolution,
    is_map,
    sees_no_border,
    with_parameters,
)

aten = torch.ops.aten


class FoldAffine(Pass):
    """Fold what scales and shifts each channel into every linear map that reads it.

        before:  x (N, C, H, W) → mul s (C, 1, 1) → add t (C, 1, 1) → conv2d w (K, C, h, w), b (K) → y (N, K, H', W')
        after:   x (N, C, H, W) → conv2d w·s, b + Σ w·t → y

    A batch norm is one too, and so is the affine part of a group norm, which itself stays. In between there may be what
    leaves channels apart: means and pools over positions, reshapes, transpositions, concatenations along the channels:

        before:  x (N, C, H, W) → batch_norm (C) → mean (2, 3) (N, C) → linear w (K, C), b (K) → y (N, K)
        after:   x (N, C, H, W) → mean (2, 3) (N, C) → linear w·s, b + w t → y

    It happens if all users can take the scale and shift, and no other map has their weights. A convolution with padding
    takes scales alone: its border would need another bias. Computed in float64 and rounded once.
    """

    name = "fold_affine"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without the scales and shifts that the maps behind them can take."""
        edit = Edit(program)
        for node in reversed(list(edit.graph.nodes)):  # a shift before the scale in front of it
            found = _of_group_norm(edit, node) or affine(edit, node)
            readers = found and readers_of(edit, found.output, found)
            if not found or not readers:
                continue
            let_read(edit, readers)
            if found.input is found.output:
                with edit.at(node):
                    edit.exchange(node, edit.emit_like(node, weight=None, bias=None))
            else:
                edit.exchange(found.output, found.input)
        return edit.finish()


@dataclasses.dataclass(frozen=True)
class Reader:
    """A map, and the float64 parameters by which it makes the same of its input before the scale and shift."""

    node: fx.Node
    weight: Tensor
    bias: Tensor


def readers_of(edit: Edit, value: fx.Node, found: Affine) -> list[Reader] | None:
    """The maps that read a value, if all its users together can take a scale and shift; None if they cannot."""
    readers: list[Reader] = []
    for user in value.users:
        if is_map(edit, user):
            more = _map(edit, user, value, found)
        elif user.target is aten.cat.default:
            more = _concatenation(edit, user, value, found)
        else:
            axis = found.axis if found.axis is None else _axis_after(user, found.axis)
            keeps = _keeps_channels(user) if found.axis is None else axis is not None
            more = readers_of(edit, user, dataclasses.replace(found, axis=axis)) if keeps else None
        if more is None:
            return None
        readers += more
    nodes = [reader.node for reader in readers]
    return readers if readers and len(set(nodes)) == len(nodes) else None


def let_read(edit: Edit, readers: list[Reader]) -> None:
    """Give the maps their parameters for their new inputs."""
    for reader in readers:
        with edit.at(reader.node):
            edit.exchange(reader.node, with_parameters(edit, reader.node, reader.weight, reader.bias))


def _map(edit: Edit, node: fx.Node, value: fx.Node, found: Affine) -> list[Reader] | None:
    values = arguments(node)
    if values["input"] is not value or len(values["weight"].users) > 1:
        return None
    if node.target is not LINEAR and not is_convolution(node):
        return None
    axis = channel_axis(node)
    if found.axis not in (None, axis) or (found.shift.any() and not sees_no_border(node)):
        return None
    whole = found.along(axis, node_shape(value)[axis])
    before = edit.constant(values["weight"])
    assert before is not None
    weight, bias = input_scaled(edit, node, whole.scale, whole.shift)
    return [Reader(node, weight, bias)] if fits_half(before, weight) and fits_half(before, bias) else None


def _concatenation(edit: Edit, node: fx.Node, value: fx.Node, found: Affine) -> list[Reader] | None:
    parts, axis = arguments(node)["tensors"], arguments(node)["dim"] % len(node_shape(node))
    if found.axis not in (None, axis):
        return None
    part = found.along(axis, node_shape(value)[axis])
    others = [torch.ones(node_shape(item)[axis], dtype=torch.float64) for item in parts]
    scales = [part.scale if item is value else ones for item, ones in zip(parts, others, strict=True)]
    shifts = [part.shift if item is value else 0 * ones for item, ones in zip(parts, others, strict=True)]
    whole = dataclasses.replace(part, scale=torch.cat(scales), shift=torch.cat(shifts))
    return readers_of(edit, node, whole)


def _keeps_channels(node: fx.Node) -> bool:
    return _pooled(node) is not None or only_moves(node)


def _axis_after(node: fx.Node, axis: int) -> int | None:
    over = _pooled(node)
    if over is None:
        return axis_after(node, axis) if only_moves(node) else None
    if axis in over:
        return None
    return axis if len(node_shape(node)) == len(node_shape(node.args[0])) else axis - sum(a < axis for a in over)  # type: ignore[arg-type]


def _pooled(node: fx.Node) -> set[int] | None:
    """The axes that a node takes means over; None if it does something else."""
    if node.target not in (aten.mean.dim, aten.adaptive_avg_pool2d.default, aten.avg_pool2d.default):
        return None
    values = arguments(node)
    rank = len(node_shape(values["self"]))
    if node.target is aten.mean.dim:
        return {axis % rank for axis in values["dim"] or range(rank)}
    return None if any(values.get("padding", [])) or values.get("divisor_override") else {rank - 2, rank - 1}


def _of_group_norm(edit: Edit, node: fx.Node) -> Affine | None:
    """The affine part of a group norm, from the norm to itself."""
    if node.target is not aten.group_norm.default:
        return None
    weight, bias = (edit.constant(arguments(node)[name]) for name in ("weight", "bias"))
    if weight is None or bias is None:
        return None
    return Affine(node, node, 1, weight.double(), bias.double())
