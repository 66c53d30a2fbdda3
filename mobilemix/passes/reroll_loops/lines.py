"""Affine functions of a state, elementwise, and the operators that take such functions to such functions."""

import dataclasses
from collections.abc import Callable

import torch
from torch import fx

from mobilemix.passes.reroll_loops.lanes import Lanes, Refusal, Rolled

aten = torch.ops.aten

Value = Rolled | float


@dataclasses.dataclass(frozen=True)
class Line:
    """slope·h + offset of a state h."""

    slope: Value
    offset: Value


_ONE = Line(0.0, 1.0)


class Lines:
    """Operators on lines; the new nodes have the place of `origin` in the user's source."""

    def __init__(self, lanes: Lanes, origin: fx.Node) -> None:
        """Nothing is computed yet."""
        self._lanes, self._origin = lanes, origin

    def call(self, name: str, *args: Line | float, **kwargs: Line | float) -> Line:
        """The ATen operator `name`, one of `OPERATORS`, on lines and numbers.

        Raises:
            Refusal: the result is not affine.
        """
        return OPERATORS[name](self, *map(_line, args), **{key: _line(item) for key, item in kwargs.items()})

    def _add(self, x: Line, y: Line, alpha: Line = _ONE) -> Line:
        y = self._mul(y, alpha)
        return Line(self._plus(x.slope, y.slope), self._plus(x.offset, y.offset))

    def _sub(self, x: Line, y: Line, alpha: Line = _ONE) -> Line:
        return self._add(x, y, self._neg(alpha))

    def _rsub(self, x: Line, y: Line, alpha: Line = _ONE) -> Line:
        return self._sub(y, x, alpha)

    def _neg(self, x: Line) -> Line:
        return self._mul(x, Line(0.0, -1.0))

    def _mul(self, x: Line, y: Line) -> Line:
        x, y = (x, y) if y.slope == 0.0 else (y, x)
        factor = _constant(y)
        return Line(self._times(x.slope, factor), self._times(x.offset, factor))

    def _div(self, x: Line, y: Line) -> Line:
        divisor = _constant(y)
        return Line(self._over(x.slope, divisor), self._over(x.offset, divisor))

    def _addcmul(self, x: Line, y: Line, z: Line, value: Line = _ONE) -> Line:
        return self._add(x, self._mul(y, z), value)

    def _addcdiv(self, x: Line, y: Line, z: Line, value: Line = _ONE) -> Line:
        return self._add(x, self._div(y, z), value)

    def _lerp(self, x: Line, end: Line, weight: Line) -> Line:
        return self._add(x, self._mul(weight, self._sub(end, x)))

    def _where(self, condition: Line, x: Line, y: Line) -> Line:
        mask = _constant(condition)
        return Line(self._choose(mask, x.slope, y.slope), self._choose(mask, x.offset, y.offset))

    def _plus(self, x: Value, y: Value) -> Value:
        if isinstance(x, float):
            x, y = y, x
        if isinstance(x, float) and isinstance(y, float):
            return x + y
        return x if y == 0.0 else self._lanes.apply(self._origin, aten.add.Tensor, x, y)

    def _times(self, x: Value, y: Value) -> Value:
        if isinstance(x, float):
            x, y = y, x
        if isinstance(x, float) and isinstance(y, float):
            return x * y
        if y in (0.0, 1.0):
            return y if y == 0.0 else x
        return self._lanes.apply(self._origin, aten.mul.Tensor, x, y)

    def _over(self, x: Value, y: Value) -> Value:
        if x == 0.0 or y == 1.0:
            return x
        return self._lanes.apply(self._origin, aten.div.Tensor, self._tensor(x), y)

    def _choose(self, mask: Value, x: Value, y: Value) -> Value:
        if x == y:
            return x
        return self._lanes.apply(self._origin, aten.where.self, mask, self._tensor(x), self._tensor(y))

    def _tensor(self, x: Value) -> Rolled:
        if isinstance(x, Rolled):
            return x
        dtype = self._origin.meta["val"].dtype
        return self._lanes.apply(self._origin, aten.full.default, [], x, dtype=dtype)


OPERATORS: dict[str, Callable[..., Line]] = {
    "add": Lines._add,
    "addcdiv": Lines._addcdiv,
    "addcmul": Lines._addcmul,
    "div": Lines._div,
    "lerp": Lines._lerp,
    "mul": Lines._mul,
    "neg": Lines._neg,
    "rsub": Lines._rsub,
    "sub": Lines._sub,
    "where": Lines._where,
}
"""Of lines, by their ATen names; the arguments are those of the schema."""


def _line(item: Line | float) -> Line:
    return item if isinstance(item, Line) else Line(0.0, float(item))


def _constant(line: Line) -> Value:
    if line.slope != 0.0:
        raise Refusal("the state is multiplied or divided by itself, or decides on a choice")
    return line.offset
