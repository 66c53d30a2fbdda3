"""Skip connections around depthwise convolutions as a tap of these."""

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments, node_shape
from mobilemix.passes.channels import Affine, affine
from mobilemix.passes.editing import Edit
from mobilemix.passes.maps import fits_half, is_convolution, is_map, parameters, with_parameters

aten = torch.ops.aten


class MergeSkips(Pass):
    """Let a depthwise convolution add its input itself: the input is what the tap in the middle sees.

        before:  x (N, C, H, W) → conv2d w (C, 1, h, w), b, C groups → y;   x → mul s (C, 1, 1) → z;   z + y
        after:   x → conv2d w + s at the middle, b → the sum

    Without a scale, s is one; a shift of the skip goes into the bias. The convolution must have stride 1, as many
    outputs as inputs and odd kernels, and its result no other user. Convolutions over several channels stay: with an
    identity on their diagonal, eight bits would be too few for their other weights.
    """

    name = "merge_skips"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with such skips in the convolutions."""
        edit = Edit(program)
        for node in list(edit.graph.nodes):
            if node.target is not aten.add.Tensor or arguments(node)["alpha"] != 1:
                continue
            a, b = node.args
            for conv, other in ((b, a), (a, b)):
                skip = _skip(edit, other, conv) if isinstance(other, fx.Node) and isinstance(conv, fx.Node) else None
                merged = skip and _with_tap(edit, conv, skip)
                if merged:
                    with edit.at(node):
                        edit.exchange(node, with_parameters(edit, conv, *merged))
                    break
        return edit.finish()


def _skip(edit: Edit, value: fx.Node, conv: fx.Node) -> Affine | None:
    """What leads from the input of a depthwise convolution around it."""
    if not is_map(edit, conv) or not is_convolution(conv) or len(conv.users) > 1:
        return None
    values = arguments(conv)
    x, kernel = values["input"], node_shape(values["weight"])
    if values["groups"] != kernel[0] or kernel[1] != 1 or node_shape(x) != node_shape(conv):
        return None
    if any(size % 2 == 0 for size in kernel[2:]) or any(step != 1 for step in values["stride"]):
        return None
    if value is x:
        return Affine(x, x, None, torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))
    found = affine(edit, value)
    return found if found and found.input is x and found.axis in (None, 1) and len(value.users) == 1 else None


def _with_tap(edit: Edit, conv: fx.Node, skip: Affine) -> tuple[Tensor, Tensor] | None:
    weight, bias = parameters(edit, conv)
    merged = weight.clone()
    taps = merged.view(len(merged), -1)  # of odd number, so that the one in the middle is the middle of each axis
    taps[:, taps.shape[1] // 2] += skip.scale
    return (merged, bias + skip.shift) if fits_half(weight, merged) else None
