"""Large depthwise filters as a sum of small ones, for which XNNPACK has kernels."""

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments
from mobilemix.passes.editing import Edit

aten = torch.ops.aten

LARGEST = 25
"""Taps of the largest filter that XNNPACK computes in one go; beyond, it was 3 to 5 times slower a tap."""


class SplitDepthwise(Pass):
    """A depthwise filter of more than 25 taps becomes several of its rows, two or three at a time.

        before:  x (B, C, H, W) → conv2d (7×7, padding 3, groups C)
        after:   x → conv2d (3×7: rows 2, 3, 4; padding 1, 3)
                 x → conv2d (2×7: rows 1 and 5; dilation 4, padding 2, 3)
                 x → conv2d (2×7: rows 0 and 6; dilation 6, padding 3, 3) → sum of the three

    Every part lies symmetrically about the middle row, so that its own "same" padding is the right one and no copy of
    the input is padded. Measured in XNNPACK (x86, one thread) at 28²×48, 14²×96 and 7²×192: 730, 357 and 178 µs before,
    158, 71 and 36 µs after, whichever way the 49 taps are shared out.
    """

    name = "split_depthwise"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without large depthwise filters."""
        edit = Edit(program)
        for node in edit.graph.find_nodes(op="call_function", target=aten.conv2d.default):
            weight = edit.constant(arguments(node)["weight"])
            if weight is not None and _is_split(node, weight):
                with edit.at(node):
                    edit.replace(node, _parts(edit, node, weight))
        return edit.finish()


def _is_split(node: fx.Node, weight: Tensor) -> bool:
    values = arguments(node)
    channels, inputs, height, width = weight.shape
    return (
        inputs == 1
        and values["groups"] == channels
        and height % 2 == width % 2 == 1
        and height * width > LARGEST
        and 2 * width <= LARGEST
        and tuple(values["stride"]) == (1, 1)
        and tuple(values["dilation"]) == (1, 1)
        and tuple(values["padding"]) == (height // 2, width // 2)
    )


def _parts(edit: Edit, node: fx.Node, weight: Tensor) -> fx.Node:
    height, width = weight.shape[2:]
    middle = height // 2
    # What lies within one row of the middle, if three rows fit; then the rows at each further distance.
    inner = 1 if 3 * width <= LARGEST else 0
    rows = [list(range(middle - inner, middle + inner + 1))]
    rows += [[middle - distance, middle + distance] for distance in range(inner + 1, middle + 1)]
    name = edit.name(arguments(node)["weight"])
    total = None
    for each in rows:
        dilation = each[1] - each[0] if len(each) > 1 else 1
        part = edit.emit_like(
            node,
            weight=edit.add_constant(f"{name}_rows_{'_'.join(map(str, each))}", weight[:, :, each]),
            bias=arguments(node)["bias"] if total is None else None,
            dilation=[dilation, 1],
            padding=[middle - each[0], width // 2],
        )
        total = part if total is None else edit.emit(aten.add.Tensor, total, part)
    assert total is not None
    return total
