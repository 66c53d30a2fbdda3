"""Scales of channels folded into the linear maps that they come from, however far."""

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mobilemix.passes.axes import SPLITS, axis_before, only_moves
from mobilemix.passes.base import Pass, PassResult, arguments, node_shape, operand
from mobilemix.passes.channels import Affine, affine
from mobilemix.passes.editing import Edit
from mobilemix.passes.fold_affine import let_read, readers_of
from mobilemix.passes.maps import channel_axis, fits_half, is_map, output_scaled, parameters, with_parameters

aten = torch.ops.aten

_MATMULS = (aten.matmul.default, aten.bmm.default, aten.mm.default)

HEADROOM = 8.0
"""By how much a value on the way may become larger than it was: three bits of float16's range."""

_Change = Callable[[], None]
"""What is still to be done to the graph."""


class FoldScales(Pass):
    """Fold multiplications by constants into the linear map that made the value.

        before:  x → linear (N, L, H·D) → reshape (N, L, H, D) → transpose q (N, H, L, D);   q k (N, H, L, M) → mul d
        after:   x → linear d·w, d·b → reshape → transpose q;   q k

    In between there may be reshapes, transpositions, matrix products with anything, relu, and slices, of which the
    others keep their scale. No value on the way may have another user.

    The scale of a skip goes the other way if what comes after can take it (`fold_affine`), and the branch its inverse:

        before:  x → mul s → z;   h → conv2d w, b → y;   z + y → conv2d v → …
        after:   h → conv2d w/s, b/s → y';   x + y' → conv2d v·s → …

    Computed in float64 and rounded once; scales by which a value on the way would grow beyond `HEADROOM` stay.
    """

    name = "fold_scales"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without the multiplications that weights can do."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            found = affine(edit, node)
            if found and found.output is node and not found.shift.any():
                write = _write_scaled(edit, found.input, found.scale, found.axis)
                if write:
                    write()
                    edit.exchange(node, cast(Affine, affine(edit, node)).input)  # which may be a new node by now
            elif node.target is aten.add.Tensor and arguments(node)["alpha"] == 1 and found is None:
                _defer(edit, node)
        return edit.finish()


def _defer(edit: Edit, node: fx.Node) -> None:
    """Multiply after the sum rather than before it, if the maps before and after do so without further cost."""
    a, b = node.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or node_shape(a) != node_shape(b):
        return
    for skip, branch in ((a, b), (b, a)):
        found = affine(edit, skip)
        if found is None or len(skip.users) > 1 or found.shift.any():
            continue
        if not (found.scale.abs().min() >= 1 / HEADROOM and found.scale.abs().max() <= HEADROOM):
            continue
        write = _write_scaled(edit, branch, 1 / found.scale, found.axis)
        readers = write and readers_of(edit, node, dataclasses.replace(found, output=node))
        if write and readers:
            write()
            let_read(edit, readers)
            edit.exchange(skip, found.input)
            return


def _write_scaled(edit: Edit, node: fx.Node, scale: Tensor, axis: int | None, is_split: bool = False) -> _Change | None:
    """How a map, or a multiplication by a constant, makes `node` times a scale, float64 (C,) or ().

    None if that cannot be done, or something else would change too.
    """
    if node.op != "call_function" or (len(node.users) != 1 and not is_split) or not scale.isfinite().all():
        return None
    if is_map(edit, node):
        return _map(edit, node, scale, axis)
    if only_moves(node):
        before = axis if axis is None else axis_before(node, axis)
        return None if axis is not None and before is None else _write_scaled(edit, operand(node), scale, before)
    if node.target in _MATMULS:
        return _product(edit, node, scale, axis) if scale.abs().max() <= HEADROOM else None
    if node.target is aten.relu.default:
        return _write_scaled(edit, operand(node), scale, axis) if scale.min() > 0 and scale.max() <= HEADROOM else None
    if node.target is operator.getitem or node.target is aten.slice.Tensor:
        return _slice(edit, node, scale, axis)
    found = affine(edit, node)
    if found is None or found.shift.any() or not (None in (axis, found.axis) or axis == found.axis):
        return None
    factor = found.scale * scale
    # Converters drop a factor that float16 cannot tell from one, and the builds of both precisions would differ.
    if bool((factor.half() == 1).all()):
        return None
    return functools.partial(_multiply, edit, node, found.input, factor, found.axis if axis is None else axis)


def _multiply(edit: Edit, node: fx.Node, x: fx.Node, factor: Tensor, axis: int | None) -> None:
    """Let a multiplication by a constant multiply by another one."""
    if axis is not None:
        factor = factor.reshape(-1, *[1] * (len(node_shape(node)) - 1 - axis))
    with edit.at(node):
        constant = edit.add_constant(f"{_constant_name(edit, node)}_scaled", factor.to(node.meta["val"].dtype))
        edit.exchange(node, edit.emit(aten.mul.Tensor, x, constant))


def _constant_name(edit: Edit, node: fx.Node) -> str:
    return next((edit.name(x) for x in node.all_input_nodes if edit.constant(x) is not None), node.name)


def _map(edit: Edit, node: fx.Node, scale: Tensor, axis: int | None) -> _Change | None:
    if axis not in (None, channel_axis(node)) or len(arguments(node)["weight"].users) > 1:
        return None
    before, after = parameters(edit, node), output_scaled(edit, node, scale, torch.zeros(()))
    fit = all(fits_half(was, now) for was, now in zip(before, after, strict=True))
    return functools.partial(_parametrise, edit, node, *after) if fit else None


def _parametrise(edit: Edit, node: fx.Node, weight: Tensor, bias: Tensor) -> None:
    with edit.at(node):
        edit.exchange(node, with_parameters(edit, node, weight, bias))


def _product(edit: Edit, node: fx.Node, scale: Tensor, axis: int | None) -> _Change | None:
    left, right = cast(tuple[fx.Node, fx.Node], node.args)
    rank = len(node_shape(node))
    if left is right or min(len(node_shape(left)), len(node_shape(right))) < 2:
        return None
    for side, summed in ((left, -1), (right, -2)):
        place = axis if axis is None else axis - rank + len(node_shape(side))
        if place is not None:
            at = len(node_shape(side)) + summed
            if place < 0 or place == at or node_shape(side)[place] != len(scale):
                continue
        write = _write_scaled(edit, side, scale, place)
        if write:
            return write
    return None


def _slice(edit: Edit, node: fx.Node, scale: Tensor, axis: int | None) -> _Change | None:
    """Scale a slice of a value whose other users are slices too, of other entries."""
    source = operand(node)
    if node.target is operator.getitem:
        if source.target not in SPLITS:
            return None
        parts, source = source, operand(source)
        along = arguments(parts)["dim"] % len(node_shape(source))
        ends = [0, *itertools.accumulate(part.shape[along] for part in parts.meta["val"])]
        taken = {item: (ends[cast(int, item.args[1])], ends[cast(int, item.args[1]) + 1]) for item in parts.users}
        if list(source.users) != [parts]:
            return None
    else:
        along = arguments(node)["dim"] % len(node_shape(source))
        cuts = {user: arguments(user) for user in source.users if user.target is aten.slice.Tensor}
        if len(cuts) < len(source.users) or any(cut["step"] != 1 or cut["dim"] != along for cut in cuts.values()):
            return None
        size = node_shape(source)[along]
        taken = {user: slice(cut["start"], cut["end"]).indices(size)[:2] for user, cut in cuts.items()}
    start, stop = taken.pop(node)
    if axis not in (None, along) or any(a < stop and start < b for a, b in taken.values()):
        return None
    whole = torch.ones(node_shape(source)[along], dtype=torch.float64)
    whole[start:stop] = scale
    return _write_scaled(edit, source, whole, along, is_split=True)
