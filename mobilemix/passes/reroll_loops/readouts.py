"""What puts the values of all steps together, computed at once."""

import dataclasses
import logging
from collections.abc import Iterator

import torch
from torch import fx

from mobilemix.passes.base import arguments, node_shape, source
from mobilemix.passes.reroll_loops.assignments import Assignment, assignment
from mobilemix.passes.reroll_loops.lanes import Lane, Lanes, Refusal, Rolled
from mobilemix.passes.reroll_loops.recurrences import FEWEST_STEPS, SHORT_PIECES

aten = torch.ops.aten

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Readout:
    """A node that is made of `parts` along `axis`, which they have unless they are `stacked`.

    If they are assigned to a part of `base`, what is before `start` in it remains, and what is behind the last part.
    """

    node: fx.Node
    axis: int
    parts: Lane
    stacked: bool
    base: fx.Node | None = None
    start: int = 0

    def join(self, lanes: Lanes) -> fx.Node | None:
        """The node anew, from values that are computed over time; None if no recurrence takes part."""
        pieces = _pieces(lanes, self.parts, self.node)
        if not any(isinstance(piece, Rolled) for piece in pieces):
            return None
        joined = [self._along_axis(lanes, piece) for piece in pieces]
        if self.base is not None:
            size = node_shape(self.node)[self.axis]
            stop = self.start + sum(node_shape(item)[self.axis] for item in joined)
            if self.start:
                joined.insert(0, lanes.emit(self.node, aten.slice.Tensor, self.base, self.axis, 0, self.start))
            if stop < size:
                joined.append(lanes.emit(self.node, aten.slice.Tensor, self.base, self.axis, stop, size))
        return joined[0] if len(joined) == 1 else lanes.emit(self.node, aten.cat.default, joined, self.axis)

    def _along_axis(self, lanes: Lanes, piece: fx.Node | Rolled) -> fx.Node:
        if isinstance(piece, fx.Node):
            return lanes.emit(self.node, aten.unsqueeze.default, piece, self.axis) if self.stacked else piece
        whole = lanes.to_axis(self.node, piece, self.axis)
        if self.stacked:
            return whole
        sizes = node_shape(whole)
        merged = [*sizes[: self.axis], sizes[self.axis] * sizes[self.axis + 1], *sizes[self.axis + 2 :]]
        return lanes.emit(self.node, aten.reshape.default, whole, merged)


def find(lanes: Lanes) -> Iterator[Readout]:
    """All of at least a few parts."""
    readout: Readout | None
    for node in lanes.order:
        if node.target is aten.stack.default:
            values = arguments(node)
            parts, axis = values["tensors"], values["dim"] % len(node_shape(node))
            readout = Readout(node, axis, tuple(parts), True)
        elif node.target is aten.cat.default:
            readout = _concatenation(node)
        else:
            readout = _assignments(node)
        if readout is not None and len(readout.parts) >= FEWEST_STEPS:
            yield readout


def _pieces(lanes: Lanes, parts: Lane, node: fx.Node) -> list[fx.Node | Rolled]:
    """The parts, as few and as long as they can be computed at once."""
    waiting, found, short = [parts], list[fx.Node | Rolled](), 0
    while waiting:
        lane = waiting.pop()
        short += len(lane) < FEWEST_STEPS
        if len(lane) < FEWEST_STEPS or short > SHORT_PIECES:
            found += lane
            continue
        try:
            rolled = lanes.roll(lane)
        except Refusal as refusal:
            _log.debug("%d parts of %s stay: %s", len(lane), source(node), refusal.reason)
            if refusal.step:
                waiting += [lane[refusal.step :], lane[: refusal.step]]
            else:
                found += lane
        else:
            found += [rolled] if rolled.timed and lanes.is_recurrent(rolled.node) else lane
    return found


def _concatenation(node: fx.Node) -> Readout | None:
    """Also of concatenations, one in another, that grow by a part a step."""
    axis = _axis(node)
    if any(user.target is aten.cat.default and _axis(user) == axis and _first(user) is node for user in node.users):
        return None
    parts: list[fx.Node] = []
    here = node
    while here.target is aten.cat.default and _axis(here) == axis:
        parts += reversed(arguments(here)["tensors"][1:])
        here = _first(here)
    return Readout(node, axis, tuple(part for part in reversed([*parts, here]) if node_shape(part) != (0,)), False)


def _assignments(node: fx.Node) -> Readout | None:
    """To one part of a tensor after another."""
    last = assignment(node)
    if last is None or any(_continues(user, node, last.axis) for user in node.users):
        return None
    parts: dict[int, tuple[int, fx.Node]] = {}
    here: Assignment | None = last
    while here is not None and here.axis == last.axis and len(node_shape(here.part)) == len(node_shape(last.part)):
        parts.setdefault(here.start, (here.stop, here.part))  # the last assignment counts
        base = here.whole
        here = assignment(base)
    starts = sorted(parts)
    stops = [parts[start][0] for start in starts]
    if stops[:-1] != starts[1:]:
        return None
    stacked = len(node_shape(last.part)) < len(node_shape(node))
    return Readout(node, last.axis, tuple(parts[start][1] for start in starts), stacked, base, starts[0])


def _continues(node: fx.Node, whole: fx.Node, axis: int) -> bool:
    found = assignment(node)
    return found is not None and found.whole is whole and found.axis == axis


def _axis(node: fx.Node) -> int:
    return int(arguments(node)["dim"]) % len(node_shape(node))


def _first(node: fx.Node) -> fx.Node:
    first: fx.Node = arguments(node)["tensors"][0]
    return first
