"""What the rules of the complex pass compute with: real tensors of the new graph, and pairs of them.

Arithmetic on either makes nodes. A part that is known to be zero is None, so that a real factor costs nothing.
"""

# ruff: noqa: D105 (arithmetic operators say what they do)

from collections.abc import Sequence
from typing import Any, Union

import torch
from torch import fx

from mobilemix.passes.editing import Edit, Op

aten = torch.ops.aten

Part = Union["Real", float, None]
"""One part of a number: a tensor, a scalar, or None for zero."""


class Real:
    """A real tensor: a node of the graph that `edit` makes."""

    def __init__(self, edit: Edit, node: fx.Node) -> None:
        """The tensor that `node` computes."""
        self.edit, self.node = edit, node

    @property
    def shape(self) -> tuple[int, ...]:
        """Its size along each axis."""
        return tuple(self.node.meta["val"].shape)

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.node.meta["val"].dtype  # type: ignore[no-any-return]

    full_dtype = dtype

    def call(self, op: Op, *args: Any, **kwargs: Any) -> "Real":
        """op(self, *args, **kwargs)."""
        return emit(self.edit, op, self, *args, **kwargs)

    def reshape(self, shape: Sequence[int]) -> "Real":
        """The same numbers in row-major order under another shape."""
        return self if tuple(shape) == self.shape else self.call(aten.reshape.default, list(shape))

    def expand(self, shape: Sequence[int]) -> "Real":
        """Broadcast to `shape`."""
        return self if tuple(shape) == self.shape else self.call(aten.expand.default, list(shape))

    def take(self, axis: int, start: int, stop: int) -> "Real":
        """Elements `start` to `stop` along `axis`."""
        return self if stop - start == self.shape[axis] else self.call(aten.slice.Tensor, axis, start, stop)

    def cast(self, dtype: torch.dtype) -> "Real":
        """In another real dtype."""
        return self if dtype == self.dtype else self.call(aten.to.dtype, dtype)

    def __neg__(self) -> "Real":
        return self.call(aten.neg.default)

    def __add__(self, other: "Real | float") -> "Real":
        return self.call(aten.add.Tensor, other)

    def __sub__(self, other: "Real | float") -> "Real":
        return self.call(aten.sub.Tensor, other)

    def __mul__(self, other: "Real | float") -> "Real":
        return self.call(aten.mul.Tensor, other)

    def __truediv__(self, other: "Real | float") -> "Real":
        return self.call(aten.div.Tensor, other)

    def __radd__(self, other: float) -> "Real":
        return self + other

    def __rsub__(self, other: float) -> "Real":
        return self.call(aten.rsub.Scalar, other)

    def __rmul__(self, other: float) -> "Real":
        return self * other


class Complex:
    """A complex tensor as two real ones of its shape.

    After a Fourier transform both parts lie in one tensor, which the next transform can use as it is: `stacked` holds
    it, with the parts along an extra axis of size 2, and `re` and `im` are cut from it only where they are needed.
    """

    def __init__(self, re: Real, im: Real) -> None:
        """Broadcast both parts to one shape."""
        self.shape = tuple(torch.broadcast_shapes(re.shape, im.shape))  # type: ignore[no-untyped-call]
        self._parts: tuple[Real, Real | None] | None = (re.expand(self.shape), im.expand(self.shape))
        self.stacked: tuple[Real, int] | None = None

    @classmethod
    def from_stacked(cls, data: Real, shape: Sequence[int], axis: int) -> "Complex":
        """Parts that lie in `data`, which holds shape[:axis] + (2,) + shape[axis:] in row-major order.

        Where `axis` is the rank, the parts lie behind the last axis, as in `torch.view_as_real`.
        """
        self = cls.__new__(cls)
        self.shape, self._parts, self.stacked = tuple(shape), None, (data, axis)
        return self

    @classmethod
    def from_real_part(cls, re: Real) -> "Complex":
        """A tensor of which nobody asks for the imaginary part."""
        self = cls(re, re)
        self._parts = re, None
        return self

    @property
    def parts(self) -> tuple[Real, Real]:
        """Real and imaginary part."""
        if self._parts is None:
            assert self.stacked is not None
            data, axis = self.stacked
            if axis == len(self.shape):
                pairs = data.reshape((*self.shape, 2))
                self._parts = pairs.call(aten.select.int, -1, 0), pairs.call(aten.select.int, -1, 1)
            else:
                size = self.shape[axis]
                both = data.reshape((*self.shape[:axis], 2 * size, *self.shape[axis + 1 :]))
                self._parts = both.take(axis, 0, size), both.take(axis, size, 2 * size)
        re, im = self._parts
        assert im is not None, "only the real part is known"
        return re, im

    @property
    def re(self) -> Real:
        """Real part."""
        return self._parts[0] if self._parts else self.parts[0]

    @property
    def im(self) -> Real:
        """Imaginary part."""
        return self.parts[1]

    @property
    def full_dtype(self) -> torch.dtype:
        """The complex dtype that it stands for."""
        part = self.stacked[0] if self.stacked else self.re
        return part.dtype.to_complex()

    @property
    def edit(self) -> Edit:
        """Where its nodes are made."""
        return self.stacked[0].edit if self.stacked else self.re.edit


Number = Real | Complex | complex
"""What arithmetic rules take: tensors, and Python scalars."""


def emit(edit: Edit, op: Op, *args: Any, **kwargs: Any) -> Real:
    """A node that calls `op` on real tensors."""
    return Real(edit, edit.emit(op, *nodes(args), **nodes(kwargs)))


def nodes(value: Any) -> Any:
    """`value` with every real tensor in it, through lists, tuples and dicts, replaced by its node."""
    if isinstance(value, Real):
        return value.node
    if isinstance(value, dict):
        return {key: nodes(item) for key, item in value.items()}
    return type(value)(map(nodes, value)) if isinstance(value, list | tuple) else value


def split(value: Number) -> tuple[Part, Part]:
    """Real and imaginary part of any number."""
    if isinstance(value, Complex):
        return value.parts
    if isinstance(value, Real):
        return value, None
    return (value.real or None, value.imag or None) if isinstance(value, complex) else (value or None, None)


def join(edit: Edit, re: Part, im: Part, shape: Sequence[int], dtype: torch.dtype) -> Complex:
    """The pair of two parts of a number with this shape and real dtype."""
    return Complex(*(fill(edit, part, shape, dtype) for part in (re, im)))


def fill(edit: Edit, part: Part, shape: Sequence[int], dtype: torch.dtype) -> Real:
    """A part as a tensor of this shape."""
    if isinstance(part, Real):
        return part.expand(shape)
    return emit(edit, aten.full.default, list(shape), float(part or 0), dtype=dtype)


def plus(a: Part, b: Part) -> Part:
    """a + b."""
    if a is None or b is None:
        return b if a is None else a
    return a + b


def minus(a: Part, b: Part) -> Part:
    """a − b."""
    if b is None:
        return a
    return -b if a is None else a - b


def times(a: Part, b: Part) -> Part:
    """a · b."""
    return None if a is None or b is None else a * b
