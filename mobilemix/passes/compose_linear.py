"""Two linear maps with nothing between them as one."""

import math

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments, node_shape
from mobilemix.passes.editing import Edit
from mobilemix.passes.maps import LINEAR, channel_axis, is_convolution, is_map, parameters, with_parameters

aten = torch.ops.aten


class ComposeLinear(Pass):
    """Multiply the weights of two linear maps that follow each other, where the product costs no more.

        before:  x (N, C, H, W) → conv2d v (D, C, h, w), a → conv2d w (K, D, 1, 1), b → y (N, K, H', W')
        after:   x (N, C, H, W) → conv2d w v (K, C, h, w), w a + b → y                if K·C·h·w ≤ D·C·h·w + K·D

    Or where the first is a part of what the second one reads:

        before:  z (N, C, H, W) → conv2d v (D, C, 1, 1), a → u;   cat (x, u) → conv2d w (K, B + D, 1, 1), b → y
        after:   cat (x, z) → conv2d [w_x, w_u v] (K, B + C, 1, 1), w_u a + b → y                if K·C ≤ D·C + K·D

    The same for linear maps of the last axis. The result of the first must have no other user. Computed in float64 and
    rounded once.
    """

    name = "compose_linear"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with such pairs as one map."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            map_: fx.Node | None = node
            while map_ is not None:
                map_ = _compose(edit, map_)
        return edit.finish()


def _compose(edit: Edit, node: fx.Node) -> fx.Node | None:
    """The map that a node is together with those before it; None if it stays."""
    if not is_map(edit, node) or not _is_pointwise(node):
        return None
    x = arguments(node)["input"]
    weight, bias = parameters(edit, node)
    if _is_composable(edit, x, node):
        with edit.at(node):
            composed = with_parameters(edit, x, *_product(edit, x, weight, bias))
    elif _puts_channels_together(x, node) and len(x.users) == 1:
        parts = list(arguments(x)["tensors"])
        found = [i for i, part in enumerate(parts) if _is_pointwise(part) and _is_composable(edit, part, node)]
        if not found:
            return None
        weights = list(torch.split(weight, [node_shape(part)[channel_axis(node)] for part in parts], 1))
        for i in found:
            weights[i], bias = _product(edit, parts[i], weights[i], bias)
            parts[i] = arguments(parts[i])["input"]
        with edit.at(node):
            together = edit.emit_like(x, tensors=parts)
            composed = with_parameters(edit, node, torch.cat(weights, 1), bias, input=together)
    else:
        return None
    edit.exchange(node, composed)
    edit.graph.eliminate_dead_code()  # who has one user is asked again
    return composed


def _puts_channels_together(x: fx.Node, node: fx.Node) -> bool:
    return x.target is aten.cat.default and arguments(x)["dim"] % len(node_shape(x)) == channel_axis(node)


def _product(edit: Edit, first: fx.Node, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a pointwise map after another map."""
    inner, shift = parameters(edit, first)
    outer = weight.flatten(1)
    return (outer @ inner.flatten(1)).reshape(len(outer), *inner.shape[1:]), bias + outer @ shift


def _is_pointwise(node: fx.Node) -> bool:
    """Whether a map computes each position from the channels at this position, all of them."""
    if node.target is LINEAR:
        return True
    if not is_convolution(node):
        return False
    values = arguments(node)
    kernel = node_shape(values["weight"])[2:]
    return (
        all(size == 1 for size in kernel)
        and values["groups"] == 1
        and all(step == 1 for step in values["stride"])
        and node_shape(node)[2:] == node_shape(values["input"])[2:]
    )


def _is_composable(edit: Edit, first: fx.Node, second: fx.Node) -> bool:
    if not is_map(edit, first) or len(first.users) > 1 or (first.target is LINEAR) != (second.target is LINEAR):
        return False
    if first.target is not LINEAR and not (is_convolution(first) and arguments(first)["groups"] == 1):
        return False
    between, read, *kernel = node_shape(arguments(first)["weight"])
    made = node_shape(second)[channel_axis(second)]
    return made * read * math.prod(kernel) <= between * read * math.prod(kernel) + made * between
