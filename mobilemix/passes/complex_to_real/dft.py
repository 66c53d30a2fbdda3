"""One-dimensional Fourier transforms as real matrices, in float64.

Angles come from index products reduced modulo n, so they are exact however large the indices are. Length n may differ
from that of the signal, which is then cut or padded with zeros; `scale` multiplies everything. A complex vector is
stacked, real part first: a matrix of complex to complex is (2·outputs, 2·inputs), and `interleaved` reorders one of
these axes from (part, index) to (index, part).
"""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Transform:
    """y[k] = scale · Σ_j exp(sign · 2πi · j · k / n) · x[j] along one axis.

    Attributes:
        takes: what x is; "half" stands for the first half of a Hermitian x, with which y is real.
        n: length.
        signal: entries of x that are given, which are cut, or padded with zeros, to n or n // 2 + 1.
        size: entries of y that are wanted, n or n // 2 + 1.
        one_part: whether the real part of y is all that is wanted.
        sign: of the exponent.
        scale: of the result.
    """

    takes: Literal["real", "complex", "half"]
    n: int
    signal: int
    size: int
    one_part: bool
    sign: int
    scale: float

    @property
    def inputs(self) -> int:
        """Real numbers that it takes."""
        return self.signal if self.takes == "real" else 2 * self.signal

    @property
    def outputs(self) -> int:
        """Real numbers that it gives."""
        return self.size if self.one_part else 2 * self.size


def dense(transform: Transform) -> Tensor:
    """(outputs, inputs), the parts of complex numbers one after the other."""
    n, signal, sign, scale = transform.n, transform.signal, transform.sign, transform.scale
    if transform.takes == "half":
        return complex_to_real(signal, n, sign, scale)
    if transform.takes == "complex":
        return complex_to_complex(signal, n, sign, scale)[: transform.outputs]
    return real_to_complex(signal, n, transform.size, sign, scale)[: transform.outputs]


def joint(transforms: tuple[Transform, ...], axes: tuple[int, ...]) -> Tensor:
    """(outputs, inputs) of transforms along several axes, one after the other in this order.

    Both sides are flattened in the order of the axes, which are numbered from 0, behind that of the parts.
    """
    sizes = [transform.signal for _, transform in sorted(zip(axes, transforms, strict=True))]
    basis = torch.eye(math.prod(sizes), dtype=torch.complex128).reshape(-1, *sizes)
    values = basis if transforms[0].takes == "real" else torch.cat((basis, 1j * basis))
    for transform, axis in zip(transforms, axes, strict=True):
        lines = values.movedim(axis + 1, -1)
        parts = lines.real if transform.takes == "real" else torch.cat((lines.real, lines.imag), -1)
        product = parts @ dense(transform).T
        if not transform.one_part:
            product = torch.complex(*product.chunk(2, -1))
        values = product.movedim(-1, axis + 1)
    values = torch.stack((values.real, values.imag), 1) if values.is_complex() else values
    return values.flatten(1).T


def complex_matrix(signal: int, n: int, outputs: int, sign: int, scale: float) -> tuple[Tensor, Tensor]:
    """Real and imaginary part, (outputs, signal) each, of scale · exp(sign · 2πi · k · j / n); zero for j ≥ n."""
    cosine, sine = _waves(outputs, min(signal, n), n)
    unused = torch.zeros(outputs, max(signal - n, 0), dtype=torch.float64)
    return torch.cat((scale * cosine, unused), 1), torch.cat((sign * scale * sine, unused), 1)


def real_to_complex(signal: int, n: int, outputs: int, sign: int, scale: float) -> Tensor:
    """(2·outputs, signal): n outputs, or n // 2 + 1 for the half that determines the rest."""
    return torch.cat(complex_matrix(signal, n, outputs, sign, scale))


def complex_to_complex(signal: int, n: int, sign: int, scale: float) -> Tensor:
    """(2·n, 2·signal)."""
    re, im = complex_matrix(signal, n, n, sign, scale)
    return torch.cat((torch.cat((re, -im), 1), torch.cat((im, re), 1)))


def complex_to_real(signal: int, n: int, sign: int, scale: float) -> Tensor:
    """(n, 2·signal): the real signal of length n whose half spectrum has `signal` entries, of which n // 2 + 1 count.

    Entries that stand for two of the full spectrum weigh twice; the imaginary parts of the others do not matter.
    """
    half = min(signal, n // 2 + 1)
    weights = torch.tensor([1.0 if 2 * k % n == 0 else 2.0 for k in range(half)], dtype=torch.float64)
    cosine, sine = _waves(n, half, n)
    unused = torch.zeros(n, signal - half, dtype=torch.float64)
    return torch.cat((scale * weights * cosine, unused, -sign * scale * weights * sine, unused), 1)


def interleaved(matrix: Tensor, axis: int) -> Tensor:
    """The rows (axis 0) or columns (axis 1) reordered from (part, index) to (index, part)."""
    rows, columns = matrix.shape
    split = (2, rows // 2, columns) if axis == 0 else (rows, 2, columns // 2)
    return matrix.reshape(split).transpose(axis, axis + 1).reshape(rows, columns)


def _waves(outputs: int, inputs: int, n: int) -> tuple[Tensor, Tensor]:
    return waves(torch.outer(torch.arange(outputs), torch.arange(inputs)), n)


def waves(steps: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π · steps / n, exact at multiples of a quarter turn."""
    steps = steps % n
    angles = steps.double() * (2 * math.pi / n)
    cosine = torch.where((4 * steps) % n == 0, angles.cos().round(), angles.cos())
    sine = torch.where((4 * steps) % n == 0, angles.sin().round(), angles.sin())
    return cosine, sine
