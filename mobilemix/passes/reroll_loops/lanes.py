"""What the steps of an unrolled loop compute, as one operation over time."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from mobilemix.passes.base import node_shape
from mobilemix.passes.editing import Edit
from mobilemix.passes.reroll_loops.batching import batch
from mobilemix.passes.reroll_loops.cuts import Cut, cut

aten = torch.ops.aten

Lane = tuple[fx.Node, ...]
"""The same value at every step of a loop, one node a step."""

_DEEPEST_BODY = 150
"""Operators, one on another, in the body of a loop; a longer chain leads out of the loop."""


@dataclasses.dataclass(eq=False)
class Refusal(Exception):  # noqa: N818 (nothing is wrong: something stays as it is)
    """Why steps cannot be computed at once, and the first step that differs from those before it, if one does."""

    reason: str
    step: int | None = None


@dataclasses.dataclass(frozen=True)
class Rolled:
    """The value of all steps: a tensor with time as its first axis, or one that is the same at every step."""

    node: fx.Node
    timed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one step."""
        return node_shape(self.node)[self.timed :]


class Lanes:
    """Lanes of one graph as tensors over time, and the new nodes that compute them.

    A new node comes right after the last thing that it depends on, so that it can stand for any node behind that.
    """

    def __init__(self, edit: Edit) -> None:
        """Start with the nodes that the graph has now."""
        self.edit = edit
        self.order = list(edit.graph.nodes)
        self.place = {node: position for position, node in enumerate(self.order)}
        self._first = max(self.place[node] for node in edit.graph.find_nodes(op="placeholder"))
        self._rolled: dict[Lane, Rolled] = {}
        self._refused: dict[Lane, tuple[str, int | None]] = {}
        self._states: dict[fx.Node, tuple[dict[fx.Node, int], fx.Node, fx.Node | None]] = {}
        self._recurrent: set[fx.Node] = set()

    def learn(self, states: Sequence[fx.Node], initial: fx.Node | None, found: fx.Node) -> None:
        """From now on `states`, one a step and `initial` before them, are `found`, a tensor over time."""
        index = {node: position for position, node in enumerate((initial, *states), start=-1) if node is not None}
        self._states.update((state, (index, found, initial)) for state in states)
        self._recurrent.add(found)
        self._refused.clear()

    def is_state(self, node: fx.Node) -> bool:
        """Whether `node` is a state that is part of a tensor over time already."""
        return node in self._states

    def is_recurrent(self, node: fx.Node) -> bool:
        """Whether a new node depends on a recurrence."""
        return node in self._recurrent

    def roll(self, lane: Lane, depth: int = 0) -> Rolled:
        """The lane over time.

        Raises:
            Refusal: the steps do not compute the same thing, or not each from its own part of the same tensors.
        """
        if all(node is lane[0] for node in lane):
            return Rolled(lane[0], False)
        if lane in self._refused:
            raise Refusal(*self._refused[lane])
        if lane not in self._rolled:
            try:
                if depth == _DEEPEST_BODY:
                    raise Refusal("its body has no end")
                self._rolled[lane] = self._roll(lane, depth)
            except Refusal as refusal:
                self._refused[lane] = refusal.reason, refusal.step
                raise
        return self._rolled[lane]

    def apply(self, origin: fx.Node, op: Any, *args: Any, **kwargs: Any) -> Rolled:
        """An operator at every step; `origin` is where in the user's source that is."""
        inputs = [item for item in _leaves((args, kwargs)) if isinstance(item, Rolled)]
        if not any(item.timed for item in inputs):
            args, kwargs = pytree.tree_map(_node, (args, kwargs), is_leaf=_is_rolled)
            return Rolled(self.emit(origin, op, *args, **kwargs), False)
        try:
            node = batch(lambda *call, **more: self.emit(origin, *call, **more), self.edit.empty, op, args, kwargs)
        except Exception as error:  # whatever vmap raises for an operator that it does not know
            raise Refusal(f"{op} cannot be batched: {str(error).splitlines()[0] if str(error) else error!r}") from error
        return Rolled(node, True)

    def emit(self, origin: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node."""
        inputs = [item for item in pytree.tree_leaves((args, kwargs)) if isinstance(item, fx.Node)]
        place = max([self._first, *(self.place[node] for node in inputs)])
        with self.edit.at(origin), self.edit.graph.inserting_before(self.order[place + 1]):
            node = self.edit.emit(op, *args, **kwargs)
        self.place[node] = place
        if not self._recurrent.isdisjoint(inputs):
            self._recurrent.add(node)
        return node

    def to_axis(self, origin: fx.Node, rolled: Rolled, axis: int) -> fx.Node:
        """The tensor with time as axis `axis`."""
        axes = list(range(1, len(rolled.shape) + 1))
        axes.insert(axis, 0)
        return rolled.node if axis == 0 else self.emit(origin, aten.permute.default, rolled.node, axes)

    def _roll(self, lane: Lane, depth: int) -> Rolled:
        rolled = self._window(lane)
        if rolled is None:
            cuts = [cut(node) for node in lane]
            rolled = self._part(lane, cuts, depth) if cuts[0] is not None else self._call(lane, depth)
        value, expected = rolled.node.meta["val"], lane[0].meta["val"]
        if rolled.shape != node_shape(lane[0]) or value.dtype != expected.dtype:
            raise Refusal(f"{lane[0].target} has another shape or dtype over time")
        return rolled

    def _window(self, lane: Lane) -> Rolled | None:
        """Successive states of a recurrence that is a tensor already."""
        known = self._states.get(lane[len(lane) // 2])
        if known is None:
            return None
        index, states, initial = known
        places = [index.get(node) for node in lane]
        if None in places:
            inside = places[0] is not None
            raise Refusal("not all are states", next(i for i, p in enumerate(places) if (p is not None) != inside))
        if -1 in places:
            assert initial is not None
            first = self.emit(lane[0], aten.expand.default, initial, list(node_shape(states)[1:]))
            first = self.emit(lane[0], aten.unsqueeze.default, first, 0)
            states = self.emit(lane[0], aten.cat.default, [first, states])
            places = [place + 1 for place in places if place is not None]
        return Rolled(self._take(lane[0], states, 0, [place for place in places if place is not None]), True)

    def _part(self, lane: Lane, cuts: list[Cut | None], depth: int) -> Rolled:
        """Parts of one tensor, each step its own; or the same part of what differs from step to step."""
        found = [item for item in cuts if item is not None]
        if len(found) < len(lane):
            raise Refusal("some steps take a part of a tensor, others do not", cuts.index(None))
        first = found[0]
        check_same("parts", [(item.axis, item.size) for item in found])
        source = self.roll(tuple(item.source for item in found), depth + 1)
        starts = [item.start for item in found]
        if source.timed or len({*starts}) == 1:
            check_same("parts", starts)
            if first.size is None:
                return self.apply(lane[0], aten.select.int, source, first.axis, first.start)
            return self.apply(lane[0], aten.slice.Tensor, source, first.axis, first.start, first.start + first.size)
        whole, axis, size = source.node, first.axis, 1 if first.size is None else first.size
        stride = starts[1] - starts[0]
        if size > 1:
            if abs(stride) != size:
                raise Refusal("the parts of successive steps are not side by side")
            low = min(starts[0], starts[-1])
            check_same("parts", [start - position * stride for position, start in enumerate(starts)])
            whole = self._slice(lane[0], whole, axis, low, low + len(lane) * size, 1)
            sizes = [*node_shape(whole)[:axis], len(lane), size, *node_shape(whole)[axis + 1 :]]
            whole = self.emit(lane[0], aten.reshape.default, whole, sizes)
            starts = [(start - low) // size for start in starts]
        taken = self._take(lane[0], whole, axis, starts)
        if axis:
            rest = [i for i in range(len(node_shape(taken))) if i != axis]
            taken = self.emit(lane[0], aten.permute.default, taken, [axis, *rest])
        if first.size == 1:
            taken = self.emit(lane[0], aten.unsqueeze.default, taken, axis + 1)
        return Rolled(taken, True)

    def _take(self, origin: fx.Node, whole: fx.Node, axis: int, starts: Sequence[int]) -> fx.Node:
        """Entries along an axis, at constant distances."""
        stride = starts[1] - starts[0]
        check_same("distances", [start - position * stride for position, start in enumerate(starts)])
        if stride == 0:
            raise Refusal("every step takes the same state")
        low, high = min(starts[0], starts[-1]), max(starts[0], starts[-1])
        taken = self._slice(origin, whole, axis, low, high + 1, abs(stride))
        return taken if stride > 0 else self.emit(origin, aten.flip.default, taken, [axis])

    def _slice(self, origin: fx.Node, whole: fx.Node, axis: int, low: int, high: int, step: int) -> fx.Node:
        if (low, high, step) == (0, node_shape(whole)[axis], 1):
            return whole
        return self.emit(origin, aten.slice.Tensor, whole, axis, low, high, step)

    def _call(self, lane: Lane, depth: int) -> Rolled:
        """The same operator at every step."""
        check_same("operators", [node.target if node.op == "call_function" else node for node in lane])
        op = lane[0].target
        if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten":
            raise Refusal(f"{op} has no form over time")
        if torch.Tag.nondeterministic_seeded in op.tags:
            raise Refusal(f"{op} draws random numbers")
        args, kwargs = self.arguments(lane, lambda part: self.roll(part, depth + 1))
        return self.apply(lane[0], op, *args, **kwargs)

    def arguments(self, lane: Lane, value: Callable[[Lane], Any]) -> Any:
        """(args, kwargs) of the calls of a lane: `value` of each argument that is a lane, and what is the same in all.

        Raises:
            Refusal: they differ in more than nodes.
        """
        calls = [pytree.tree_flatten((node.args, node.kwargs)) for node in lane]
        check_same("arguments", [spec for _, spec in calls])
        leaves: list[Any] = []
        for items in zip(*(values for values, _ in calls), strict=True):
            if isinstance(items[0], fx.Node):
                check_same("arguments", [isinstance(item, fx.Node) for item in items])
                leaves.append(value(items))
            else:
                check_same("arguments", [(type(item), item) for item in items])
                leaves.append(items[0])
        return pytree.tree_unflatten(leaves, calls[0][1])


def check_same(what: str, values: Iterable[object]) -> None:
    """Refuse steps that are not alike in this.

    Raises:
        Refusal: with the first step that differs.
    """
    first, *others = values
    for step, value in enumerate(others, start=1):
        if value != first:
            raise Refusal(f"different {what}: {first} and {value}", step)


def _is_rolled(item: object) -> bool:
    return isinstance(item, Rolled)


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value, is_leaf=_is_rolled)


def _node(item: Any) -> Any:
    return item.node if isinstance(item, Rolled) else item
