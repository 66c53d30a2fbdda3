"""Rules for the operations of MIL programs, by theme; importing this package completes `RULES`."""

from mobilemix.targets.coreml.mil_ops import (
    constant,
    convolution,
    elementwise,
    image,
    indexing,
    linear,
    normalization,
    reduction,
    shape,
)
from mobilemix.targets.coreml.mil_ops.base import RULES, Rule

__all__ = [
    "RULES",
    "Rule",
    "constant",
    "convolution",
    "elementwise",
    "image",
    "indexing",
    "linear",
    "normalization",
    "reduction",
    "shape",
]
