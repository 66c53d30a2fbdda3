"""Reshapes, transpositions and splits: what rules about them share."""

import math

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleClassBase

SWAP = (0, 2, 1)
"""(N, C, L) to (N, L, C) and back."""

PARTS = range(2, 5)
"""Numbers of parts of a Split that there are rules for, one rule each: a pattern has a fixed number of outputs."""


class KeepRead(RewriteRuleClassBase):  # type: ignore[misc]
    """A rule that also matches where other nodes read what lies inside its pattern, and leaves that to them."""

    def __init__(self) -> None:
        """Name the rule after its class."""
        super().__init__(type(self).__name__, remove_nodes=False)


def image_of(flat: ir.Value | None) -> ir.Value | None:
    """The image (N, C, H, W) that a value (N, C, H·W) is the reshape of, or None."""
    node = None if flat is None else flat.producer()
    if node is None or node.op_type != "Reshape" or flat is None:
        return None
    image = node.inputs[0]
    if image is None or image.shape is None or flat.shape is None or len(image.shape) != 4 or len(flat.shape) != 3:
        return None
    batch, channels, *sizes = map(int, image.shape)
    return image if tuple(map(int, flat.shape)) == (batch, channels, math.prod(sizes)) else None


def is_pointwise(conv: ir.Node) -> bool:
    """Whether a convolution of sequences reads one position for each that it writes."""
    kernel, attributes = conv.inputs[1], conv.attributes
    if kernel is None or kernel.shape is None or len(kernel.shape) != 3 or kernel.shape[2] != 1:
        return False
    return not any(attributes.get_ints("pads", ())) and attributes.get_ints("strides", (1,)) in ((1,), [1])
