"""Types of activations and weights in 8 bits, and which CPU each is for.

| format | activations | weights                | for                                                             |
|--------|-------------|------------------------|-----------------------------------------------------------------|
| u8s8   | unsigned    | signed, −127 … 127     | x86 with VNNI (AVX512-VNNI, AVX-VNNI, AMX), and Arm             |
| s8s8   | signed      | signed, −127 … 127     | Arm, and runtimes that have signed kernels alone                |
| u8u8   | unsigned    | unsigned, zero at 128  | x86 without VNNI: exact, on any CPU                             |
| u8s7   | unsigned    | signed, −63 … 63       | x86 without VNNI: exact and faster, weights half as fine        |

The trap: without VNNI, ONNX Runtime multiplies u8s8 with VPMADDUBSW, which adds pairs of products in 16 bits and clips
the sums: 255·127 + 255·127 is 64770, and 32767 is what it makes of that. Nothing says so, and the file is right. A pair
of u8s7 is 255·63·2 = 32130 at most, and u8u8 has a kernel of its own that widens to 16 bits before it multiplies. (A
session with `session.x64quantprecision` set to "1" takes that kernel for u8s8 as well.)

Activations are asymmetric in every format: what a Relu leaves has all 256 steps, and clips for free.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from mobilemix.quantization.affine import Grid, grid_between
from mobilemix.quantization.options import FORMATS as NAMES
from mobilemix.targets.base import Array


@dataclasses.dataclass(frozen=True)
class Format:
    """Types of activations and weights.

    Attributes:
        signed: whether activations are.
        signed_weights: whether weights are.
        weight_bits: that weights use, of 8.
    """

    signed: bool = False
    signed_weights: bool = True
    weight_bits: int = 8

    def activation(self, low: float, high: float) -> Grid:
        """The grid of a value in this range."""
        return grid_between(low, high, signed=self.signed, symmetric=False)

    def weight(self, magnitudes: Array, axis: int) -> Grid:
        """The grid of a weight, symmetric, for the magnitudes (C,) of its slices along an axis."""
        bits, signed = self.weight_bits, self.signed_weights
        return grid_between(-magnitudes, magnitudes, bits=bits, signed=signed, narrow=True, axis=axis)


FORMATS: Mapping[str, Format] = dict(
    zip(NAMES, (Format(), Format(signed=True), Format(signed_weights=False), Format(weight_bits=7)), strict=True)
)


def zeros(grid: Grid) -> Array:
    """A grid's zero points in the type of its integers."""
    return grid.zero_point.astype(np.dtype(grid.dtype))
