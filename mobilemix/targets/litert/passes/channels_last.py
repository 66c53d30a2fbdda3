"""Channels last through the whole network, in tokens and attention too."""

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mobilemix.passes.axes import RESHAPES, SPLITS, permutation
from mobilemix.passes.base import Pass, PassResult, arguments, node_shape
from mobilemix.passes.channels import batch_norm
from mobilemix.passes.editing import Edit
from mobilemix.passes.elementwise import UNARY
from mobilemix.targets.litert.passes.views import (
    View,
    materialize,
    plain,
    refine,
    request,
    stored_as,
)

aten = torch.ops.aten

SPATIAL = (
    aten.conv2d.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
)
"""Operators of images: each is left between two permutations."""
_BINARY = frozenset({"add", "mul", "sub", "div", "maximum", "minimum"})
_LAST, _FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # of an image: where channels come from, and where they go back to
_SMALL = 2.0**-5  # what is squared is scaled by; a power of two, so that nothing is rounded
_NARROW = 8  # below so many columns a product from the left costs more than a transposition


class ChannelsLast(Pass):
    """XNNPACK convolves images whose channels lie side by side, so everything between convolutions should too.

        before:  x (B, C, H, W) → conv2d → reshape (B, C, H·W) → conv1d (1) → transpose → matmul → reshape → conv2d
        after:   x → permute (B, H, W, C) → [conv2d] → reshape (B, H·W, C) → linear → matmul → reshape → [conv2d]

    [conv2d] is permute → conv2d → permute, which the converter takes for its own convolution of (B, H, W, C).

    Values keep a note of the order in which they are stored (see `views`), so that permutations, reshapes and
    transposed operands are nothing at all, until an operator needs numbers side by side that are not. Products choose
    between A·B and (Bᵀ·Aᵀ)ᵀ, and multiply by constants, such as those of Fourier transforms along rows and columns,
    from the left where the axis is not the last one in memory. XNNPACK has no product with a transposed left operand,
    and no fully connected layer of weights that are computed; neither is left.
    """

    name = "channels_last"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program in that layout; as it is, if nothing in it has channels."""
        edit = Edit(program)
        if not any(node.target in SPATIAL for node in edit.graph.nodes):
            return edit.finish()
        layout = _Layout(edit)
        for node in list(edit.graph.nodes):
            layout.visit(node)
        return edit.finish()


class _Layout:
    """The values so far: each as a view of what is stored."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit
        self.views: dict[object, View] = {}
        self.parts: dict[fx.Node, list[View]] = {}
        self.rules: dict[object, Callable[[fx.Node], View | None]] = {
            **dict.fromkeys(SPATIAL, self.spatial),
            aten.adaptive_avg_pool2d.default: self.global_pool,
            aten.conv1d.default: self.pointwise,
            aten.linear.default: self.linear,
            aten.mm.default: self.product,
            aten.bmm.default: self.product,
            aten.matmul.default: self.product,
            **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default), self.reduction),
            **dict.fromkeys((aten.softmax.int, aten._softmax.default), self.softmax),
            aten.group_norm.default: self.group_norm,
            aten.batch_norm.default: self.batch_norm,
            aten.cat.default: self.concatenation,
            aten.slice.Tensor: self.slice,
            **dict.fromkeys((aten.permute.default, aten.transpose.int), self.permute),
            **dict.fromkeys(RESHAPES, self.reshape),
            operator.getitem: self.item,
        }

    def visit(self, node: fx.Node) -> None:
        """Compute a node on what is stored; what has no rule, and what leaves the program, on values as they are."""
        if node.op == "output":
            node.args = pytree.tree_map_only(fx.Node, self.plain_value, node.args)
            return
        if node.op == "placeholder":
            self.views[node] = plain(node)
            return
        with self.edit.at(node):
            if node.target in SPLITS:
                if self.split(node):
                    return
                view = None
            else:
                view = self.rule(node)
            if view is not None:
                self.views[node] = view
                self.edit.changed = True
                return
            for each in node.all_input_nodes:
                if each in self.views and (value := materialize(self.edit, self.views[each])) is not each:
                    node.replace_input_with(each, value)
        if isinstance(node.meta.get("val"), torch.Tensor):
            self.views[node] = plain(node)

    def rule(self, node: fx.Node) -> View | None:
        rule = self.rules.get(node.target)
        if rule is not None:
            return rule(node)
        if not isinstance(node.target, torch._ops.OpOverload) or node.target.namespace != "aten":
            return None
        name = node.target._opname
        if name in UNARY:
            return self.unary(node)
        return self.binary(node) if name in _BINARY else None

    def plain_value(self, node: fx.Node) -> fx.Node:
        if node not in self.views:
            return node
        with self.edit.at(next(iter(self.edit.graph.find_nodes(op="output"))), origin=node):
            return materialize(self.edit, self.views[node])

    def of(self, value: Any) -> View:
        return self.views[value]

    # Convolutions and pools.

    def spatial(self, node: fx.Node) -> View | None:
        x = self.of(_args(node)[0])
        if len(x.axes) != 4:
            return None
        last = request(self.edit, x, x.permuted(_LAST).axes)
        first = self.edit.emit(aten.permute.default, last, list(_FIRST))
        name = "input" if node.target is aten.conv2d.default else "self"
        result = self.edit.emit_like(node, **{name: first})
        return plain(self.edit.emit(aten.permute.default, result, list(_LAST))).permuted(_FIRST)

    def global_pool(self, node: fx.Node) -> View | None:
        if node_shape(node)[2:] != (1, 1):
            return None
        return self.reduce(self.of(_args(node)[0]), aten.mean.dim, (2, 3), True)

    def pointwise(self, node: fx.Node) -> View | None:
        values = arguments(node)
        weight = self.edit.constant(values["weight"])
        if weight is None or weight.shape[2] != 1 or values["groups"] != 1 or len(node_shape(node)) != 3:
            return None
        if tuple(values["stride"]) != (1,) or values["padding"] not in ([0], (0,)):
            return None
        matrix = self.edit.add_constant(f"{self.edit.name(values['weight'])}_matrix", weight[:, :, 0])
        return self.map(self.of(values["input"]), 1, matrix, values["bias"])

    # Products.

    def linear(self, node: fx.Node) -> View | None:
        values = arguments(node)
        if self.edit.constant(values["weight"]) is None:
            return None
        x = self.of(values["input"])
        return self.map(x, len(x.axes) - 1, values["weight"], values["bias"])

    def product(self, node: fx.Node) -> View | None:
        a, b = self.of(_args(node)[0]), self.of(_args(node)[1])
        constant = self.edit.constant(b.node)
        if len(b.axes) == 2 and constant is not None and b.node is _args(node)[1]:
            weight = self.edit.add_constant(f"{self.edit.name(b.node)}_transposed", constant.T)
            return self.map(a, len(a.axes) - 1, weight, None)
        if min(len(a.axes), len(b.axes)) < 2 or a.shape[:-2] != b.shape[:-2]:
            return None
        for axis in range(len(a.axes) - 2):
            finer = refine(a.sizes(axis), b.sizes(axis))
            if finer is None:
                return None
            a, b = a.split(axis, finer) or a, b.split(axis, finer) or b
        columns = refine(a.sizes(len(a.axes) - 1), b.sizes(len(b.axes) - 2))
        if columns is None:
            return None
        a, b = a.split(len(a.axes) - 1, columns) or a, b.split(len(b.axes) - 2, columns) or b
        return self.dot(a, b)

    def dot(self, a: View, b: View) -> View:
        """The product of two values, or that of their transposes, whichever copies less."""
        straight = _cost(a) + min(_cost(b), _cost(_turned(b)))
        swapped = _cost(_turned(b)) + min(_cost(a), _cost(_turned(a)))
        if swapped < straight:
            result = self.dot_stored(_turned(b), _turned(a))
            return _turned(result)
        return self.dot_stored(a, b)

    def dot_stored(self, a: View, b: View) -> View:
        batch = [atom for axis in a.axes[:-2] for atom in axis]
        left = request(self.edit, a, [batch, *a.axes[-2:]])
        others = [atom for axis in b.axes[:-2] for atom in axis]
        if _cost(_turned(b)) < _cost(b):
            right = request(self.edit, b, [others, b.axes[-1], b.axes[-2]])
            right = self.edit.emit(aten.transpose.int, right, 1, 2)
        else:
            right = request(self.edit, b, [others, *b.axes[-2:]])
        node = self.edit.emit(aten.bmm.default, left, right)
        sizes = [a.atoms[atom] for atom in [*batch, *a.axes[-2]]] + [b.atoms[atom] for atom in b.axes[-1]]
        numbers = itertools.count()
        axes = tuple(tuple(next(numbers) for _ in axis) for axis in (*a.axes[:-1], b.axes[-1]))
        return View(node, tuple(sizes), axes)

    def map(self, x: View, axis: int, weight: fx.Node, bias: Any) -> View:
        """A linear map with weights (N, K) of one axis of a value."""
        inner = list(x.axes[axis])
        rest = [atom for atom in range(len(x.atoms)) if atom not in inner]
        after = [atom for atom in rest if inner and atom > inner[-1]]
        contiguous = bool(inner) and inner == list(range(inner[0], inner[0] + len(inner)))
        columns = math.prod(x.atoms[atom] for atom in after)
        outputs = node_shape(weight)[0]
        if contiguous and columns >= _NARROW:
            before = [atom for atom in rest if atom < inner[0]]
            rows = request(self.edit, x, [before, inner, after])
            name = f"{self.edit.name(weight)}_left"
            left = self.edit.add_constant(name, self.constant(weight)[None].expand(node_shape(rows)[0], -1, -1))
            node = self.edit.emit(aten.bmm.default, left, rows)
            if bias is not None:
                shift = self.edit.add_constant(f"{self.edit.name(bias)}_column", self.constant(bias)[:, None])
                node = self.edit.emit(aten.add.Tensor, node, shift)
        else:
            before, after = rest, []
            blocks = x.blocks()
            # A single row, as after a global mean: the converter fails to fuse a mean that keeps axes.
            single = all(x.atoms[atom] == 1 for atom in before)
            outer = blocks[:-1] if blocks[-1] == inner and not single else [before]
            node = self.edit.emit(aten.linear.default, request(self.edit, x, [*outer, inner]), weight, bias)
        order = [*before, -1, *after] if outputs > 1 else [*before, *after]
        sizes = tuple(outputs if atom == -1 else x.atoms[atom] for atom in order)
        place = {atom: position for position, atom in enumerate(order)}
        new = (place[-1],) if outputs > 1 else ()
        axes = tuple(new if k == axis else tuple(place[atom] for atom in each) for k, each in enumerate(x.axes))
        return View(node, sizes, axes)

    def constant(self, node: fx.Node) -> torch.Tensor:
        found = self.edit.constant(node)
        assert found is not None
        return found

    # Elementwise operators and reductions.

    def unary(self, node: fx.Node) -> View | None:
        if node.all_input_nodes != [_args(node)[0]]:
            return None
        x = self.of(_args(node)[0])
        result = self.edit.emit(node.target, x.node, *_args(node)[1:], **node.kwargs)
        return dataclasses.replace(x, node=result)

    def binary(self, node: fx.Node) -> View | None:
        if len(node.all_input_nodes) == 1 and not all(isinstance(item, fx.Node) for item in _args(node)[:2]):
            operands = [item if not isinstance(item, fx.Node) else self.of(item).node for item in _args(node)[:2]]
            x = self.of(node.all_input_nodes[0])
            return dataclasses.replace(x, node=self.emit_binary(node, operands))
        shape = node_shape(node)
        views = [_padded(self.of(item), len(shape)) for item in _args(node)[:2]]
        leaders = [position for position, view in enumerate(views) if view.shape == shape]
        if not leaders:
            return None
        lead = self.leader(views, leaders)
        anchor, other = views[lead], views[1 - lead]
        for axis in range(len(shape)):
            if other.axes[axis]:
                sizes = refine(anchor.sizes(axis), other.sizes(axis))
                if sizes is None:
                    return None
                anchor, other = anchor.split(axis, sizes) or anchor, other.split(axis, sizes) or other
        partner = {
            mine: theirs
            for axis in range(len(shape))
            if other.axes[axis]
            for mine, theirs in zip(anchor.axes[axis], other.axes[axis], strict=True)
        }
        blocks = [part for block in anchor.blocks() for part in _homogeneous(block, partner)]
        operands = [
            request(self.edit, anchor, blocks),
            request(self.edit, other, [[partner[atom] for atom in block if atom in partner] for block in blocks]),
        ]
        return dataclasses.replace(anchor, node=self.emit_binary(node, operands if lead == 0 else operands[::-1]))

    def emit_binary(self, node: fx.Node, operands: Sequence[Any]) -> fx.Node:
        return self.edit.emit(node.target, *operands, *_args(node)[2:], **node.kwargs)

    def leader(self, views: Sequence[View], candidates: Sequence[int]) -> int:
        """Whose order the result is stored in: no constant's; of images channels last, of tokens as they are."""
        if len(candidates) == 1:
            return candidates[0]
        for mine, other in ((0, 1), (1, 0)):
            if self.edit.constant(views[other].node) is not None:
                return mine
        natural = [_cost(view) == 0 for view in views]
        is_image = len(views[0].axes) == 4
        return 1 if natural[0] == is_image and natural[1] != natural[0] else 0

    def reduction(self, node: fx.Node) -> View | None:
        values = arguments(node)
        rank = len(self.of(values["self"]).axes)
        dims = values["dim"]
        if dims is None or values.get("dtype") is not None:
            return None
        dims = [axis % rank for axis in ([dims] if isinstance(dims, int) else dims)]
        return self.reduce(self.of(values["self"]), node.target, dims, values["keepdim"])

    def reduce(self, x: View, op: Any, dims: Iterable[int], keepdim: bool) -> View | None:
        dims = list(dims)
        gone = {atom for axis in dims for atom in x.axes[axis]}
        if not gone:
            return None
        blocks = [part for block in x.blocks() for part in _homogeneous(block, gone)]
        places = [place for place, block in enumerate(blocks) if block and block[0] in gone]
        node = self.edit.emit(op, request(self.edit, x, blocks), places, True)
        kept = [[atom for atom in block if atom not in gone] for block in blocks]
        axes = [() if axis in dims else each for axis, each in enumerate(x.axes) if keepdim or axis not in dims]
        return stored_as(node, View(x.node, x.atoms, tuple(axes)), kept)

    def softmax(self, node: fx.Node) -> View | None:
        x = self.of(_args(node)[0])
        axis = int(_args(node)[1]) % len(x.axes)
        inner = list(x.axes[axis])
        if node.kwargs.get("dtype") is not None or (len(_args(node)) > 2 and _args(node)[2] not in (None, False)):
            return None
        if not inner:
            return None
        blocks = x.blocks()
        if blocks[-1] != inner:
            blocks = [[atom for atom in range(len(x.atoms)) if atom not in inner], inner]
        result = self.edit.emit(aten.softmax.int, request(self.edit, x, blocks), -1)
        return stored_as(result, x, blocks)

    def group_norm(self, node: fx.Node) -> View | None:
        """One group: mean and variance are those of everything in a sample.

        Scaled down before it is squared, and eps with it, which changes nothing: float16, in which GPUs may compute,
        holds no square of 256.
        """
        values = arguments(node)
        x = self.of(values["input"])
        if values["num_groups"] != 1 or x.axes[0] or not _has_own_axes(x, 1):
            return None
        blocks = x.blocks()
        every = list(range(len(blocks)))
        emit = self.edit.emit
        mean = emit(aten.mean.dim, x.node, every, True)
        centred = emit(aten.mul.Tensor, emit(aten.sub.Tensor, x.node, mean), _SMALL)
        variance = emit(aten.mean.dim, emit(aten.mul.Tensor, centred, centred), every, True)
        scale = emit(aten.rsqrt.default, emit(aten.add.Tensor, variance, _SMALL**2 * values["eps"]))
        weight, bias = (self.per_channel(x, values[name]) for name in ("weight", "bias"))
        result = emit(aten.mul.Tensor, centred, scale if weight is None else emit(aten.mul.Tensor, weight, scale))
        return dataclasses.replace(x, node=result if bias is None else emit(aten.add.Tensor, result, bias))

    def batch_norm(self, node: fx.Node) -> View | None:
        """One that no convolution took: a multiplication and an addition."""
        x, found = self.of(_args(node)[0]), batch_norm(self.edit, node)
        if found is None or not _has_own_axes(x, 1):
            return None
        name, dtype = self.edit.name(arguments(node)["running_mean"]), node.meta["val"].dtype
        result = x.node
        for op, label, vector in ((aten.mul.Tensor, "factor", found.scale), (aten.add.Tensor, "shift", found.shift)):
            operand = self.per_channel(x, self.edit.add_constant(f"{name}_{label}", vector.to(dtype)))
            result = self.edit.emit(op, result, operand)
        return dataclasses.replace(x, node=result)

    def per_channel(self, x: View, parameter: fx.Node | None) -> fx.Node | None:
        """A constant with a number per channel (axis 1), to broadcast against what is stored."""
        if parameter is None:
            return None
        channel = x.axes[1]
        shape = [math.prod(x.atoms[atom] for atom in block if atom in channel) for block in x.blocks()]
        vector = self.constant(parameter).reshape(shape)
        return self.edit.add_constant(f"{self.edit.name(parameter)}_stored", vector)

    # What only says which numbers, and in which order.

    def permute(self, node: fx.Node) -> View:
        return self.of(_args(node)[0]).permuted(permutation(node))

    def reshape(self, node: fx.Node) -> View | None:
        return self.of(_args(node)[0]).reshaped(node_shape(node))

    def item(self, node: fx.Node) -> View | None:
        parts = self.parts.get(_args(node)[0])
        return parts[int(_args(node)[1])] if parts else None

    def slice(self, node: fx.Node) -> View | None:
        values = arguments(node)
        x = self.of(values["self"])
        if values["step"] != 1:
            return None
        axis = values["dim"] % len(x.axes)
        start, end, _ = slice(values["start"], values["end"]).indices(x.shape[axis])
        return self.cut(x, axis, start, end)

    def split(self, node: fx.Node) -> bool:
        x = self.of(_args(node)[0])
        axis = int(arguments(node)["dim"]) % len(x.axes)
        bounds = list(itertools.accumulate((value.shape[axis] for value in node.meta["val"]), initial=0))
        parts = [self.cut(x, axis, start, end) for start, end in itertools.pairwise(bounds)]
        if None in parts:
            return False
        self.parts[node] = [part for part in parts if part is not None]
        return True

    def cut(self, x: View, axis: int, start: int, end: int) -> View | None:
        """A range of one axis."""
        inner = list(x.axes[axis])
        if not inner or inner != list(range(inner[0], inner[0] + len(inner))) or end - start < 1:
            return None
        blocks, place = _with_block(x, inner)
        node = self.edit.emit(aten.slice.Tensor, request(self.edit, x, blocks), place, start, end)
        return _resized(x, axis, end - start, node)

    def concatenation(self, node: fx.Node) -> View | None:
        views = [self.of(item) for item in _args(node)[0]]
        rank = len(node_shape(node))
        axis = int(arguments(node)["dim"]) % rank
        if any(len(view.axes) != rank for view in views):
            return None
        lead = max(range(len(views)), key=lambda k: (self.edit.constant(views[k].node) is None, _cost(views[k]) > 0))
        for other in range(rank):
            if other == axis:
                continue
            sizes: list[int] | None = list(views[0].sizes(other))
            for view in views[1:]:
                sizes = refine(sizes, view.sizes(other)) if sizes is not None else None
            if sizes is None:
                return None
            views = [view.split(other, sizes) or view for view in views]
        anchor = views[lead]
        inner = list(anchor.axes[axis])
        if not inner or inner != list(range(inner[0], inner[0] + len(inner))):
            return None
        blocks, place = _with_block(anchor, inner)
        operands = []
        for view in views:
            partner = {
                mine: theirs
                for k in range(rank)
                if k != axis
                for mine, theirs in zip(anchor.axes[k], view.axes[k], strict=True)
            }
            theirs = [
                [partner[atom] for atom in block] if k != place else view.axes[axis] for k, block in enumerate(blocks)
            ]
            operands.append(request(self.edit, view, theirs))
        result = self.edit.emit(aten.cat.default, operands, place)
        return _resized(anchor, axis, node_shape(node)[axis], result)


def _cost(view: View) -> int:
    """Numbers to copy until a value is stored as it is."""
    order = [atom for axis in view.axes for atom in axis]
    return 0 if view.is_stored(order) else math.prod(view.atoms)


def _turned(matrix: View) -> View:
    """Its transpose."""
    return matrix.permuted([*range(len(matrix.axes) - 2), -1, -2])


def _args(node: fx.Node) -> Sequence[Any]:
    """Its positional arguments."""
    return node.args


def _has_own_axes(x: View, axis: int) -> bool:
    """Whether no axis of what is stored holds atoms of this axis and of others."""
    inner = set(x.axes[axis])
    return all(set(block) <= inner or not set(block) & inner for block in x.blocks())


def _padded(view: View, rank: int) -> View:
    return dataclasses.replace(view, axes=((),) * (rank - len(view.axes)) + view.axes)


def _homogeneous(block: Sequence[int], special: Iterable[int]) -> list[list[int]]:
    """The atoms of one stored axis in parts that are special throughout, or not at all."""
    if not block:
        return [[]]
    chosen = set(special)
    return [list(part) for _, part in itertools.groupby(block, key=lambda atom: atom in chosen)]


def _with_block(x: View, inner: list[int]) -> tuple[list[list[int]], int]:
    """The stored axes, one of them made of these atoms alone, and which."""
    blocks = []
    for block in x.blocks():
        if set(block) <= set(inner) and block:
            if block[0] == inner[0]:
                blocks.append(inner)
        else:
            parts = _homogeneous(block, inner)
            blocks += [
                inner if part[:1] == inner[:1] else part for part in parts if not part or part[0] not in inner[1:]
            ]
    return blocks, blocks.index(inner)


def _resized(x: View, axis: int, size: int, node: fx.Node) -> View:
    """The view of a node that holds a value like `x`, but for the size of one axis."""
    inner = x.axes[axis]
    order = [atom for atom in range(len(x.atoms)) if atom not in inner[1:]]
    if size == 1:
        order.remove(inner[0])
    atoms = tuple(size if atom == inner[0] else x.atoms[atom] for atom in order)
    place = {atom: position for position, atom in enumerate(order)}
    axes = tuple(tuple(place[atom] for atom in each if atom in place) for each in x.axes)
    return View(node, atoms, axes)
