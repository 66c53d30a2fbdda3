"""Which operators compute each element from the elements at the same place."""

import torch
from torch import fx

UNARY = frozenset(
    {
        *("abs", "clamp", "elu", "exp", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "neg"),
        *("relu", "relu6", "rsqrt", "sigmoid", "silu", "softplus", "softshrink", "sqrt", "square", "tanh"),
    }
)
BINARY = frozenset({"add", "mul", "sub"})


def is_elementwise(node: fx.Node, names: frozenset[str]) -> bool:
    """Whether `node` calls one of the ATen operators of these names, in any overload."""
    op = node.target
    return isinstance(op, torch._ops.OpOverload) and op.namespace == "aten" and op._opname in names
