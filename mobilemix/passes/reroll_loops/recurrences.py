"""Chains of states, each an affine function of the one before, elementwise."""

import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from mobilemix.passes.base import node_shape, source
from mobilemix.passes.reroll_loops.lanes import Lane, Lanes, Refusal, check_same
from mobilemix.passes.reroll_loops.lines import OPERATORS, Line, Lines, Value

aten = torch.ops.aten

FEWEST_STEPS = 8
"""A shorter loop stays: it is as fast as a scan, and easier on later passes."""

_WIDEST_BODY = 64
"""Operators to look at for the previous state."""
SHORT_PIECES = 2
"""Of a loop that does not do the same all along, pieces that may be too short to roll: the first step, the last."""

_PERIODS = (1, 2, 3, 4)
"""How many links of a chain may be one step: a loop may update its state more than once in the same way."""

_log = logging.getLogger(__name__)

Path = tuple[tuple[Any, int], ...]
"""From a state to the one before: which operator, and which of its arguments, on and on."""


@dataclasses.dataclass(frozen=True)
class Chain:
    """States after every step of a loop, and the one before the first."""

    initial: fx.Node
    states: tuple[fx.Node, ...]


@dataclasses.dataclass(frozen=True)
class Recurrence:
    """A chain that is one scan.

    Attributes:
        states: as the loop computes them.
        found: all of them, over time.
        last: the last one.
        body: the states, and what the last step computes from the one before.
    """

    states: tuple[fx.Node, ...]
    found: fx.Node
    last: fx.Node
    body: frozenset[fx.Node]


def find(lanes: Lanes) -> list[Chain]:
    """Chains by structure alone, the last first; of those with the same last state, the likeliest first."""
    numbers: dict[Path, int] = {}
    seen: set[tuple[fx.Node, int]] = set()
    found = []
    for node in reversed(lanes.order):
        if not _is_affine(node):
            continue
        for path in _paths(node):
            number = numbers.setdefault(path, len(numbers))
            if (node, number) not in seen:
                chain = _follow(node, path)
                seen.update((state, number) for state in chain.states)
                if len(chain.states) >= FEWEST_STEPS:
                    found.append(chain)
    return found


def roll(lanes: Lanes, chain: Chain) -> list[Recurrence]:
    """The chain as scans: one, or several one after another if the loop does not do the same all along."""
    every = (chain.initial, *chain.states)
    for period in _PERIODS:
        states = every[len(chain.states) % period :: period]
        if found := _roll(lanes, Chain(states[0], states[1:])):
            return found
    return []


def _roll(lanes: Lanes, chain: Chain) -> list[Recurrence]:
    pieces, short, found = [chain], 0, []
    while pieces and short <= SHORT_PIECES:
        piece = pieces.pop()
        if lanes.is_state(piece.states[-1]):
            continue
        if len(piece.states) < FEWEST_STEPS:
            short += 1
            continue
        try:
            found.append(_Body(lanes, piece).roll())
        except Refusal as refusal:
            place = source(piece.states[-1])
            _log.debug("%d steps of the loop at %s stay: %s", len(piece.states), place, refusal.reason)
            if refusal.step:
                rest = Chain(piece.states[refusal.step - 1], piece.states[refusal.step :])
                pieces += [rest, Chain(piece.initial, piece.states[: refusal.step])]
    return found


def _is_affine(node: object) -> bool:
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return False
    is_known = node.target.namespace == "aten" and node.target._opname in OPERATORS
    value = node.meta["val"]
    return is_known and isinstance(value, torch.Tensor) and value.is_floating_point()


def _paths(node: fx.Node) -> Iterator[Path]:
    """Ways up from a state, through elementwise operators, to what may be the state before; shortest first."""
    queue: list[tuple[fx.Node, Path]] = [(node, ())]
    for place, path in queue:
        for position, item in enumerate(place.args):
            if not isinstance(item, fx.Node) or not _is_affine(item) or not _is_alike(item, node):
                continue
            longer = (*path, (place.target, position))
            if item.target is node.target:
                yield longer
            if len(queue) < _WIDEST_BODY and _operators(item) != _operators(node):
                queue.append((item, longer))


def _operators(node: fx.Node) -> tuple[object, ...]:
    """Of a node and its arguments: two states agree in them, but for the first."""
    return (node.target, *(item.target if isinstance(item, fx.Node) else item for item in node.args))


def _follow(node: fx.Node, path: Path) -> Chain:
    """The chain that ends with `node`: the same path up again and again."""
    states, here = [node], node
    while True:
        above: Any = here
        for op, position in path:
            if not isinstance(above, fx.Node) or above.target is not op or len(above.args) <= position:
                return Chain(states[-1], tuple(reversed(states[:-1])))
            above = above.args[position]
        if not isinstance(above, fx.Node):
            return Chain(states[-1], tuple(reversed(states[:-1])))
        if not _is_alike(above, node):
            return Chain(above, tuple(reversed(states)))
        states.append(above)
        here = above


def _is_alike(a: fx.Node, b: fx.Node) -> bool:
    return node_shape(a) == node_shape(b) and bool(a.meta["val"].dtype == b.meta["val"].dtype)


class _Body:
    """One step of a chain as a function of the state before it."""

    def __init__(self, lanes: Lanes, chain: Chain) -> None:
        self._lanes, self._chain = lanes, chain
        self._origin = chain.states[-1]
        self._before = (chain.initial, *chain.states[:-1])
        last = chain.states[-2]
        self._depends = {last}  # what depends on the state before, at the last step
        for node in lanes.order[lanes.place[last] + 1 : lanes.place[self._origin] + 1]:
            if not self._depends.isdisjoint(node.all_input_nodes):
                self._depends.add(node)
        self._known: dict[Lane, Line] = {}
        self._lines = Lines(lanes, self._origin)

    def roll(self) -> Recurrence:
        """The scan.

        Raises:
            Refusal: the chain is not one.
        """
        lanes, states = self._lanes, self._chain.states
        sizes, dtype = [len(states), *node_shape(states[0])], states[0].meta["val"].dtype
        line = self._line(states)
        b, initial = self._over_time(line.offset, sizes), self._initial(dtype)
        emit = functools.partial(lanes.emit, self._origin)
        if line.slope == 1.0:
            found, last = emit(aten.cumsum.default, b, 0), emit(aten.sum.dim_IntList, b, [0])
            if initial is not None:
                found, last = (emit(aten.add.Tensor, item, initial) for item in (found, last))
        else:
            a = self._over_time(line.slope, [len(states), *[1] * (len(sizes) - 1)])
            found = emit(torch.ops.mobilemix.linear_scan.default, a, b, initial)
            last = emit(aten.select.int, found, 0, len(states) - 1)
        if list(node_shape(found)) != sizes or found.meta["val"].dtype != dtype:
            raise Refusal("the state changes its shape or dtype")
        if lanes.place[found] >= lanes.place[states[0]]:
            raise Refusal("it needs what is computed from its own states")
        lanes.learn(states, self._chain.initial, found)
        return Recurrence(states, found, last, frozenset({*self._depends, *states}))

    def _line(self, lane: Lane) -> Line:
        if lane[-1] not in self._depends:
            return Line(0.0, self._lanes.roll(lane))
        if lane[-1] is self._before[-1]:
            check_same("states", [node is before for node, before in zip(lane, self._before, strict=True)])
            return Line(1.0, 0.0)
        if lane not in self._known:
            check_same("operators", [node.target for node in lane])
            if not _is_affine(lane[0]):
                raise Refusal(f"{lane[0].target} of the state is not affine")
            args, kwargs = self._lanes.arguments(lane, self._line)
            if not all(isinstance(item, Line | float | int) for item in (*args, *kwargs.values())):
                raise Refusal(f"{lane[0].target} rounds")
            self._known[lane] = self._lines.call(lane[0].target._opname, *args, **kwargs)  # type: ignore[union-attr]
        return self._known[lane]

    def _over_time(self, value: Value, sizes: list[int]) -> fx.Node:
        """What broadcasts to (steps, *state), with at least these sizes."""
        if isinstance(value, float):
            dtype = self._origin.meta["val"].dtype
            return self._lanes.emit(self._origin, aten.full.default, sizes, value, dtype=dtype)
        ones = [1] * (len(sizes) - 1 - len(value.shape))
        full = [sizes[0], *ones, *value.shape]
        node = value.node
        if value.timed and ones:
            node = self._lanes.emit(self._origin, aten.reshape.default, node, full)
        wanted = [max(pair) for pair in zip(sizes, full, strict=True)]
        return (
            node
            if list(node_shape(node)) == wanted
            else self._lanes.emit(self._origin, aten.expand.default, node, wanted)
        )

    def _initial(self, dtype: torch.dtype) -> fx.Node | None:
        """The state before the first step; None for zero."""
        node = self._chain.initial
        if node.target is aten.zeros.default or (node.target is aten.full.default and node.args[1] == 0):
            return None
        if node.meta["val"].dtype == dtype:
            return node
        return self._lanes.emit(self._origin, aten.to.dtype, node, dtype)
