"""Layers in float between rounded values, which ONNX Runtime would round by itself.

Of a convolution or Gemm that reads what DequantizeLinear gives, and whose output goes to QuantizeLinear, with a Relu or
Clip between them or not, it rounds the float weights when it loads the file, with one scale for all channels
(`WeightBiasQuantization`, among its basic optimisations). Nothing says so, and the file is right; a layer that was left
in float because 8 bits spoil it is spoiled all the same. Weights are left alone where the input has a scale for each
channel.
"""

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from mobilemix.targets.onnx.pairs import DEQUANTISED, OWN, Pairs
from mobilemix.targets.onnx.rewrites.constants import constant

ROUNDED = ("Conv", "ConvTranspose", "Gemm")
"""What ONNX Runtime does that to."""


def keep_floats(graph: ir.Graph, integers: Collection[ir.Node]) -> None:
    """Give what other nodes than `integers` read its scale once for each channel, in place; the numbers are the same.

    Before:   x' → DequantizeLinear(s, z) → Conv(w)
    After:    x' → DequantizeLinear((s, s, …), (z, z, …)) → Conv(w)
    """
    pairs = Pairs(graph)
    for node in [each for each in graph if each.op_type in ROUNDED and each not in integers]:
        value = node.inputs[0]
        assert value is not None
        source, shape = value.producer(), value.shape or ()
        # A vector of one scale would be as good as a number.
        axis = next((axis for axis, size in enumerate(shape) if isinstance(size, int) and size > 1), None)
        if source is None or source.op_type != "DequantizeLinear" or axis is None:
            continue
        numbers, scale, zero = source.inputs
        assert numbers is not None
        assert scale is not None
        assert zero is not None
        name = f"{str(value.name).removesuffix(DEQUANTISED)}{OWN}{node.outputs[0].name}"
        scales, zeros = (np.full(int(shape[axis]), constant(each)) for each in (scale, zero))
        by_channel = pairs.parameters(name, scales, zeros)
        node.replace_input_with(0, pairs.read(numbers, *by_channel, name, node, axis=axis))
