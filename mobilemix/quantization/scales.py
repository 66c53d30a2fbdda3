"""Which channels of a program's values can be multiplied by a number, if layers' weights make up for it.

A layer can give out its channels larger by any factors: it multiplies the rows of its weights and its bias by them. And
it can take them so: it divides the columns. What stands between a channel's writers and its readers has to pass factors
on: relu, pools and whatever moves numbers do; a sum does, where both of its sides have the same ones; a sigmoid does
not. So the channels of all values fall into families of one factor each. That of a family which meets anything else, or
an input or output of the program, is one.

The pairs and triples of layers of Nagel et al. (arXiv 1906.04721, section 4.1) are families of one writer and one
reader; a residual stream, with all that is added to it and all that reads it, is one too.
"""

import dataclasses
import math
import operator
from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mobilemix.passes.axes import only_moves
from mobilemix.passes.base import arguments, node_shape, operand
from mobilemix.passes.editing import Edit
from mobilemix.passes.maps import LINEAR, channel_axis, is_convolution, is_map, output_scaled, with_parameters

FIXED = 0
"""The family whose factor is one."""

_MOVES = frozenset(
    {
        *("alias", "cat", "channel_shuffle", "chunk", "clone", "contiguous", "expand", "flip", "movedim", "narrow"),
        *("pixel_shuffle", "repeat", "roll", "select", "slice", "split", "split_with_sizes", "stack", "unbind"),
    }
)
_HOMOGENEOUS = frozenset({"abs", "leaky_relu", "neg", "relu"})
_POOLS = frozenset(
    {
        *("adaptive_avg_pool2d", "avg_pool2d", "max_pool2d", "upsample_bilinear2d", "upsample_nearest2d"),
    }
)
_REDUCTIONS = frozenset({"amax", "amin", "mean", "sum"})
_SUMS = frozenset({"add", "sub", "rsub"})
_PRODUCTS = frozenset({"bmm", "matmul", "mm"})
_NORMS = {"group_norm": 1, "layer_norm": -1}
"""Their axis of channels."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear map or convolution.

    Attributes:
        node: its call.
        reads: whether its columns can make up for factors; those of transposed convolutions are left alone.
        magnitudes: the largest weight that leads from an input channel to an output channel, float64
            (groups, outputs / groups, inputs / groups).
        inputs: families of its input channels, (C,).
        outputs: families of its output channels, (O,).
    """

    node: fx.Node
    reads: bool
    magnitudes: Tensor
    inputs: Tensor
    outputs: Tensor

    @property
    def is_depthwise(self) -> bool:
        """Whether each of its rows reads one channel."""
        return self.magnitudes.shape[2] == 1

    def ranges(self, factors: Tensor) -> tuple[Tensor, Tensor]:
        """Largest weight of each row (O,) and of each column (C,), once families have these factors."""
        groups, rows, columns = self.magnitudes.shape
        scaled = self.magnitudes * factors[self.outputs].reshape(groups, rows, 1)
        scaled = scaled / factors[self.inputs].reshape(groups, 1, columns)
        return scaled.amax(2).flatten(), scaled.amax(1).flatten()


class Families:
    """The families of a program's channels.

    Attributes:
        layers: linear maps and convolutions with weights of their own, in order.
        count: of families, `FIXED` among them.
    """

    def __init__(self, program: ExportedProgram) -> None:
        """Find them; the program stays as it is."""
        self._edit = Edit(program)
        self._parents = [FIXED]
        self._names: dict[fx.Node, Tensor | list[Tensor]] = {}
        """Provisional families of a value's numbers, with size 1 along axes on which they do not differ; a list for a
        value of several tensors."""
        self._static: set[fx.Node] = set()
        self._maps: list[fx.Node] = []
        self._norms: list[fx.Node] = []
        self._constants: list[tuple[fx.Node, fx.Node, str]] = []
        """Sums and products of a value and a constant: the call, the value, the constant's argument."""
        for node in self._edit.graph.nodes:
            inputs = node.all_input_nodes
            if self._edit.constant(node) is not None or (inputs and self._static.issuperset(inputs)):
                self._static.add(node)
            elif node.op == "call_function":
                self._names[node] = pytree.tree_map(_compressed, self._passed(node))
            else:
                self._fix(*inputs)
        roots = torch.tensor([self._root(name) for name in range(len(self._parents))])
        found, families = torch.unique(roots, return_inverse=True)
        self._families: Tensor = families
        self.count = len(found)
        self.layers = [self._layer(node) for node in self._maps]

    def scaled(self, factors: Tensor) -> ExportedProgram:
        """The program with the channels of each family larger by its factor; may be called once.

        Args:
            factors: positive, float64 (count,); that of `FIXED` is one.

        Returns:
            A program of the same outputs, to the last bit if factors are powers of two.
        """
        edit = self._edit
        for layer in self.layers:
            wider, narrower = factors[layer.outputs], 1 / factors[layer.inputs]
            if (wider == 1).all() and (narrower == 1).all():
                continue
            weight, bias = output_scaled(edit, layer.node, wider, torch.zeros((), dtype=torch.float64))
            if layer.reads:
                groups, rows, columns = layer.magnitudes.shape
                by_column = narrower.reshape(groups, 1, columns).expand(groups, rows, columns)
                weight = weight * by_column.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
            with edit.at(layer.node):
                edit.exchange(layer.node, with_parameters(edit, layer.node, weight, bias))
        for node in self._norms:
            wider = self._factors(node, factors).flatten()
            self._multiply(node, {"weight": wider, "bias": wider})
        for node, x, name in self._constants:
            wider = self._factors(node, factors)
            if _name(node) not in _SUMS:
                wider = wider / self._factors(x, factors)
            self._multiply(node, {name: 1 / wider if _name(node) == "div" else wider})
        return edit.finish().program

    def _multiply(self, node: fx.Node, by: Mapping[str, Tensor]) -> None:
        """Let a call have constants that are larger by factors."""
        changes = {}
        for name, factor in by.items():
            given = arguments(node)[name]
            content = self._edit.constant(given)
            assert content is not None
            if (factor != 1).any():
                larger = content.double() * factor.reshape(factor.shape[max(factor.dim() - content.dim(), 0) :])
                changes[name] = self._edit.add_constant(self._edit.name(given), larger.to(content.dtype))
        if changes:
            with self._edit.at(node):
                self._edit.exchange(node, self._edit.emit_like(node, **changes))

    def _layer(self, node: fx.Node) -> Layer:
        values, axis = arguments(node), channel_axis(node)
        weight = self._edit.constant(values["weight"])
        assert weight is not None
        reads, groups = _reads(node), values.get("groups", 1)
        magnitudes = weight.double().abs().flatten(2).amax(2) if weight.dim() > 2 else weight.double().abs()
        magnitudes = magnitudes.reshape(groups, -1, weight.shape[1])
        return Layer(
            node,
            reads,
            magnitudes if reads else magnitudes.swapaxes(1, 2),  # a transposed convolution has (inputs, outputs)
            self._channels(values["input"], axis) if reads else torch.full((weight.shape[0],), FIXED),
            self._channels(node, axis),
        )

    def _channels(self, node: fx.Node, axis: int) -> Tensor:
        """The family of each channel."""
        return self._families[self._of(node).flatten()].expand(node_shape(node)[axis])

    def _factors(self, node: fx.Node, factors: Tensor) -> Tensor:
        found: Tensor = factors[self._families[self._of(node)]]
        return found

    # From here on, families are provisional: what operators pass on, and which of them they tie together.

    def _passed(self, node: fx.Node) -> Tensor | list[Tensor]:
        """Families of what a call returns, once its inputs have what it needs."""
        if node.target is operator.getitem:
            parts = self._names[operand(node)]
            return parts[cast(int, node.args[1])] if isinstance(parts, list) else _FIXED
        passed = self._rule(node)
        if passed is None:
            self._fix(*node.all_input_nodes)
            return _FIXED
        return passed

    def _rule(self, node: fx.Node) -> Tensor | list[Tensor] | None:
        """The same by operator; None if it passes nothing on."""
        name = _name(node)
        if is_map(self._edit, node):
            return self._map(node)
        if name in _MOVES or only_moves(node):
            return self._moved(node)
        if name in _SUMS:
            return self._sum(node)
        if name in ("mul", "div"):
            return self._scaling(node)
        if name in _PRODUCTS:
            return self._product(node)
        if name in _NORMS:
            return self._norm(node)
        if name in _HOMOGENEOUS or (name == "clamp" and list(node.args[1:]) == [0]):
            return self._of(operand(node))
        if name in _POOLS and len(node_shape(node)) == 4:
            return self._alike(operand(node), (2, 3))
        if name in _REDUCTIONS:
            values, rank = arguments(node), len(node_shape(operand(node)))
            over = {axis % rank for axis in values.get("dim") or range(rank)}
            kept = self._alike(operand(node), over)
            return kept if values.get("keepdim") else kept.squeeze(tuple(over))
        return None

    def _map(self, node: fx.Node) -> Tensor | None:
        values, axis = arguments(node), channel_axis(node)
        if len(values["weight"].users) > 1:
            return None
        if _reads(node):
            self._alike(values["input"], set(range(len(node_shape(node)))) - {axis})
        else:
            self._fix(values["input"])
        self._maps.append(node)
        return self._new(node, axis)

    def _norm(self, node: fx.Node) -> Tensor | None:
        values = arguments(node)
        weight, bias = (self._edit.constant(values[name]) for name in ("weight", "bias"))
        if weight is None or bias is None or weight.dim() > 1:
            return None
        self._fix(operand(node))
        self._norms.append(node)
        return self._new(node, _NORMS[_name(node)] % len(node_shape(node)))

    def _moved(self, node: fx.Node) -> Tensor | list[Tensor]:
        """Let the operator move the families as it moves the numbers."""
        expanded = {x: self._of(x).expand(node_shape(x)).contiguous() for x in node.all_input_nodes}
        args, kwargs = pytree.tree_map(
            lambda item: expanded.get(item, item) if isinstance(item, fx.Node) else item, (node.args, node.kwargs)
        )
        moved = cast(torch._ops.OpOverload, node.target)(*args, **kwargs)
        return list(moved) if isinstance(moved, list | tuple) else moved

    def _sum(self, node: fx.Node) -> Tensor | None:
        rank = len(node_shape(node))
        values = arguments(node)
        variables = [name for name in ("self", "other") if self._varies(values[name])]
        if len(variables) == 2:
            left, right = (_aligned(self._of(values[name]), rank) for name in variables)
            self._tie(left, right)
            return left + torch.zeros_like(right)
        (name,) = variables
        constant = self._edit.constant(values["other" if name == "self" else "self"])
        names = _aligned(self._of(values[name]), rank)
        if constant is None or not _covers(constant, names):
            return None
        self._constants.append((node, values[name], "other" if name == "self" else "self"))
        return names

    def _scaling(self, node: fx.Node) -> Tensor | None:
        """A product or quotient number by number."""
        rank = len(node_shape(node))
        values = arguments(node)
        if _name(node) == "div" and self._varies(values["other"]):
            self._fix(values["other"])
        variables = [name for name in ("self", "other") if self._varies(values[name])]
        if len(variables) == 2:
            return _aligned(self._carried(values["self"], values["other"]), rank)
        (name,) = variables
        names = _aligned(self._of(values[name]), rank)
        rest = "other" if name == "self" else "self"
        constant = self._edit.constant(values[rest])
        if constant is None or (_name(node) == "div" and rest == "self"):
            return names
        axes = [axis for axis, size in enumerate(constant.shape, rank - constant.dim()) if size > 1]
        if len(axes) != 1 or not _covers(constant, names):
            return names
        # The constant makes up for any factors, before and behind.
        self._constants.append((node, values[name], rest))
        return self._new(node, axes[0])

    def _product(self, node: fx.Node) -> Tensor | None:
        left, right = cast(tuple[fx.Node, fx.Node], node.args)
        if min(len(node_shape(left)), len(node_shape(right))) < 2:
            return None
        self._alike(left, {len(node_shape(left)) - 1})
        self._alike(right, {len(node_shape(right)) - 2})
        return _aligned(self._carried(left, right), len(node_shape(node)))

    def _carried(self, a: fx.Node, b: fx.Node) -> Tensor:
        """Families of a product of two values, of which one at most may have factors."""
        if not self._is_fixed(a) and not self._is_fixed(b):
            self._fix(min((b, a), key=lambda x: math.prod(node_shape(x))))
        return self._of(b if self._is_fixed(a) else a)

    def _alike(self, x: fx.Node, axes: Collection[int]) -> Tensor:
        """Families of a value, which along these axes are tied to be one."""
        names = self._of(x)
        for axis in axes:
            if names.shape[axis] > 1:
                first = names.narrow(axis, 0, 1)
                self._tie(names, first)
                names = self._names[x] = first
        return names

    def _of(self, x: fx.Node) -> Tensor:
        names = self._names.get(x)
        return names if isinstance(names, Tensor) and names.dim() else torch.full([1] * len(node_shape(x)), FIXED)

    def _new(self, node: fx.Node, axis: int) -> Tensor:
        shape = node_shape(node)
        first = len(self._parents)
        self._parents.extend(range(first, first + shape[axis]))
        return torch.arange(first, len(self._parents)).reshape(-1, *[1] * (len(shape) - 1 - axis))[(None,) * axis]

    def _varies(self, value: object) -> bool:
        return isinstance(value, fx.Node) and value not in self._static

    def _is_fixed(self, x: fx.Node) -> bool:
        return all(self._root(name) == FIXED for name in set(self._of(x).flatten().tolist()))

    def _fix(self, *values: fx.Node) -> None:
        for x in values:
            for names in pytree.tree_leaves(self._names.get(x, _FIXED)):
                self._tie(names, torch.full_like(names, FIXED))

    def _tie(self, left: Tensor, right: Tensor) -> None:
        """Make two families one, for each pair of them."""
        for a, b in {*zip((left + 0 * right).flatten().tolist(), (right + 0 * left).flatten().tolist(), strict=True)}:
            low, high = sorted((self._root(a), self._root(b)))
            self._parents[high] = low

    def _root(self, name: int) -> int:
        while self._parents[name] != name:
            self._parents[name] = name = self._parents[self._parents[name]]
        return name


_FIXED = torch.tensor(FIXED)


def _name(node: fx.Node) -> str:
    """The name of an ATen operator, without its overload."""
    return cast(str, getattr(node.target, "_opname", ""))


def _reads(node: fx.Node) -> bool:
    return node.target is LINEAR or is_convolution(node)


def _aligned(names: Tensor, rank: int) -> Tensor:
    return names.reshape([1] * (rank - names.dim()) + list(names.shape))


def _covers(constant: Tensor, names: Tensor) -> bool:
    """Whether a constant has a number for each family."""
    sizes = [1] * (names.dim() - constant.dim()) + list(constant.shape)
    return all(own in (1, size) for own, size in zip(names.shape, sizes, strict=True))


def _compressed(names: Tensor) -> Tensor:
    """With size 1 along each axis on which families do not differ."""
    for axis, size in enumerate(names.shape):
        if size > 1 and (names == (first := names.narrow(axis, 0, 1))).all():
            names = first
    return names
