"""Sums and multiples of linear maps as one linear map."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments
from mobilemix.passes.editing import Edit, bias_name

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_LINEAR = aten.linear.default


class MergeLinear(Pass):
    """Compute with the weights what is computed with the results of linear maps and convolutions.

    Heads of a classifier that are averaged, as after training by distillation, are one head:

        before:  x (N, C) → linear W_a (K, C) → a (N, K);   x → linear W_b (K, C) → b (N, K);   (a + b) / 2 → y (N, K)
        after:   x (N, C) → linear (W_a + W_b) / 2 (K, C) → y (N, K)

    Heads of several features are one head of all of them:

        before:  x (N, C) → linear U (K, C) → a (N, K);   z (N, D) → linear V (K, D) → b (N, K);   a + s · b → y (N, K)
        after:   cat (x, z) (N, C + D) → linear [U, s · V] (K, C + D) → y (N, K)

    Convolutions of the same inputs whose results are added in several ways, as in a complex product, are one:

        before:  r, i (B, G·C, H, W) → conv2d U: Ur, Ui;  conv2d V: Vr, Vi (B, G·K, H, W);   Ur − Vi → a;   Ui + Vr → b
        after:   cat (r, i) per group (B, G·2C, H, W) → conv2d [[U, −V], [V, U]] (B, G·2K, H, W) → slices a, b

    A constant that is added to each position of a channel goes into the bias. Values in between must have no other
    user. Computed in float64 and rounded once.
    """

    name = "merge_linear"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with as few linear maps as its sums of them need."""
        edit = Edit(program)
        nodes = list(edit.graph.nodes)
        inside: set[fx.Node] = set()
        sums: dict[fx.Node, _Map] = {}
        for node in reversed(nodes):  # from the results, so that a sum is seen before its summands
            found = None if node in inside else _expand(edit, node)
            if found is not None:
                inside.update(found.nodes)
                sums[node] = found
        for results in _alike(sums):
            with edit.at(min(results, key=nodes.index)):
                merged = _emit(edit, [sums[result] for result in results])
            for result, replacement in zip(results, merged, strict=True):
                edit.replace(result, replacement)
        return edit.finish()


@dataclasses.dataclass(frozen=True)
class _Map:
    """Σ weight · input + bias.

    Attributes:
        call: a linear map or convolution of the sum, which has the options of them all.
        weights: float64, by input.
        bias: float64 (K,).
        nodes: what the sum consists of.
    """

    call: fx.Node
    weights: dict[fx.Node, Tensor]
    bias: Tensor
    nodes: frozenset[fx.Node]

    def options(self) -> dict[str, Any]:
        values = arguments(self.call)
        return {name: value for name, value in values.items() if name not in ("input", "weight", "bias")}

    def plus(self, other: "_Map", factor: float) -> "_Map | None":
        if self.call.target is not other.call.target or self.options() != other.options():
            return None
        if self.call.meta["val"].shape != other.call.meta["val"].shape:
            return None
        weights = dict(self.weights)
        for x, weight in other.weights.items():
            term = factor * weight
            if x in weights and weights[x].shape != term.shape:
                return None
            weights[x] = weights[x] + term if x in weights else term
        return _Map(self.call, weights, self.bias + factor * other.bias, self.nodes | other.nodes)

    def times(self, factor: Tensor) -> "_Map":
        """Each output multiplied by its entry of `factor` (K,)."""
        scaled = {x: factor.reshape(-1, *[1] * (weight.dim() - 1)) * weight for x, weight in self.weights.items()}
        return dataclasses.replace(self, weights=scaled, bias=factor * self.bias)


def _alike(sums: dict[fx.Node, _Map]) -> list[list[fx.Node]]:
    """The results to compute anew, the last first: alone, or together where convolutions have all inputs in common."""
    together: dict[object, list[fx.Node]] = {}
    for node, found in sums.items():
        several = len(found.weights) > 1 and found.call.target in _CONVOLUTIONS
        kernels = tuple(weight.shape[2:] for weight in found.weights.values())
        key = (frozenset(found.weights), found.call.target, repr(found.options()), kernels) if several else node
        together.setdefault(key, []).append(node)
    return [nodes for nodes in together.values() if len(nodes) > 1 or _is_worthwhile(sums[nodes[0]])]


def _is_worthwhile(found: _Map) -> bool:
    """Whether one call in place of several nodes pays: the inputs' concatenation must cost less than the product."""
    if len(found.weights) == 1:
        return len(found.nodes) > 1
    copied = sum(math.prod(x.meta["val"].shape) for x in found.weights)
    return found.call.target is _LINEAR and copied < sum(weight.numel() for weight in found.weights.values())


def _expand(edit: Edit, node: fx.Node, is_result: bool = True) -> _Map | None:
    """The node as a sum of linear maps."""
    if node.op != "call_function" or (not is_result and len(node.users) != 1):
        return None
    if node.target is _LINEAR or node.target in _CONVOLUTIONS:
        return _leaf(edit, node)
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        found = _sum(edit, node)
    elif node.target in (aten.mul.Tensor, aten.div.Tensor):
        found = _multiple(edit, node)
    else:
        return None
    return found and dataclasses.replace(found, nodes=found.nodes | {node})


def _leaf(edit: Edit, node: fx.Node) -> _Map | None:
    values = arguments(node)
    weight, bias = edit.constant(values["weight"]), edit.constant(values["bias"])
    if weight is None or (values["bias"] is not None and bias is None):
        return None
    shift = torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.double()
    return _Map(node, {values["input"]: weight.double()}, shift, frozenset([node]))


def _sum(edit: Edit, node: fx.Node) -> _Map | None:
    a, b = node.args
    factor = float(arguments(node)["alpha"]) * (-1 if node.target is aten.sub.Tensor else 1)
    left, right = (_expand(edit, item, is_result=False) if isinstance(item, fx.Node) else None for item in (a, b))
    if left and right:
        return left.plus(right, factor)
    if left:
        shift = _per_channel(edit, b, left)
        return None if shift is None else dataclasses.replace(left, bias=left.bias + factor * shift)
    if right:
        shift = _per_channel(edit, a, right)
        scaled = right.times(torch.full_like(right.bias, factor))
        return None if shift is None else dataclasses.replace(scaled, bias=scaled.bias + shift)
    return None


def _multiple(edit: Edit, node: fx.Node) -> _Map | None:
    a, b = node.args
    if node.target is aten.mul.Tensor and isinstance(a, fx.Node) and edit.constant(a) is not None:
        a, b = b, a
    found = _expand(edit, a, is_result=False) if isinstance(a, fx.Node) else None
    factor = _per_channel(edit, b, found) if found else None
    if found is None or factor is None:
        return None
    return found.times(1 / factor if node.target is aten.div.Tensor else factor)


def _per_channel(edit: Edit, value: Any, of: _Map) -> Tensor | None:
    """A scalar, or a constant with one number for each channel of a map, as float64 (K,)."""
    tensor = edit.constant(value) if isinstance(value, fx.Node) else torch.tensor(value, dtype=torch.float64)
    result = of.call.meta["val"]
    if tensor is None or tensor.dim() > result.dim():
        return None
    shape = (*[1] * (result.dim() - tensor.dim()), *tensor.shape)
    channel = result.dim() - 1 if of.call.target is _LINEAR else 1
    if any(size != 1 for axis, size in enumerate(shape) if axis != channel) or shape[channel] not in (1, len(of.bias)):
        return None
    return tensor.double().flatten().expand(len(of.bias))


def _emit(edit: Edit, sums: list[_Map]) -> list[fx.Node]:
    """One call for several sums over the same inputs, and its slices."""
    call, inputs = sums[0].call, list(sums[0].weights)
    groups = arguments(call).get("groups", 1)
    result = call.meta["val"]
    weight = _stack([torch.cat([found.weights[x] for x in inputs], 1) for found in sums], groups)
    bias = _stack([found.bias for found in sums], groups)
    name = edit.name(arguments(call)["weight"])
    merged = edit.emit_like(
        call,
        input=inputs[0]
        if len(inputs) == 1
        else _concatenate(edit, inputs, groups, -1 if call.target is _LINEAR else 1),
        weight=edit.add_constant(name, weight.to(result.dtype)),
        bias=edit.add_constant(bias_name(name), bias.to(result.dtype)),
    )
    if len(sums) == 1:
        return [merged]
    channels, space = result.shape[1] // groups, math.prod(result.shape[2:])
    whole = edit.emit(aten.reshape.default, merged, [result.shape[0], groups, len(sums) * channels, space])
    parts = [edit.emit(aten.slice.Tensor, whole, 2, k * channels, (k + 1) * channels) for k in range(len(sums))]
    return [edit.emit(aten.reshape.default, part, list(result.shape)) for part in parts]


def _stack(parts: list[Tensor], groups: int) -> Tensor:
    """Parameters of several maps as those of one, whose outputs are theirs side by side in each group."""
    return torch.cat([part.reshape(groups, -1, *part.shape[1:]) for part in parts], 1).flatten(0, 1)


def _concatenate(edit: Edit, inputs: list[fx.Node], groups: int, axis: int) -> fx.Node:
    """The inputs side by side in each group of channels."""
    if groups == 1:
        return edit.emit(aten.cat.default, inputs, axis)
    parts = []
    for x in inputs:
        batch, channels, *space = x.meta["val"].shape
        parts.append(edit.emit(aten.reshape.default, x, [batch, groups, channels // groups, math.prod(space)]))
    both = edit.emit(aten.cat.default, parts, 2)
    return edit.emit(aten.reshape.default, both, [batch, groups * both.meta["val"].shape[2], *space])
