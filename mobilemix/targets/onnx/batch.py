"""One graph for every batch, out of the graphs of two.

Passes, translations and rewrites know every size, which is what makes them good, so they see one batch at a time. What
differs between the graphs of two batches is then all that depends on the batch, and has to follow from its size n:

    batches of 2 and 3                               any batch
    Reshape to (2, 8, 49) and (3, 8, 49)             Reshape to (−1, 8, 49)
    Expand to (2, 1, 64) and (3, 1, 64)              Expand to n · (1, 0, 0) + (0, 1, 64)
    x + c, with c of (2, 49, 64) and (3, 49, 64)     x + c of (1, 49, 64), if that is what both repeat
    Concat of such a c and x                         Concat of the same, expanded, and x
    indices (0, 1) and (0, 1, 2)                     Range(n)

Anything else that differs, be it an operator, an attribute or a number, is an error that names its place.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import fx

from mobilemix.batches import BATCH, FIXED
from mobilemix.errors import BatchError
from mobilemix.passes.base import source
from mobilemix.targets.base import Lowered

_BROADCASTING = frozenset({"Add", "And", "Div", "Equal", "Max", "Min", "Mul", "Or", "Pow", "Sub", "Where"})
"""Operators that take one row for all samples where another of their inputs has one for each."""

_REST = -1
"""The size in a Reshape that follows from the others."""


def generalise(model: ir.Model, other: ir.Model, places: Mapping[str, fx.Node]) -> None:
    """Make the graph of one batch that of every batch, in place.

    Args:
        model: every shape in it is known; inputs that have a batch have it as their first axis.
        other: the same for another batch, which has no divisor in common with the first.
        places: nodes by the names of values, which know where in the user's source they come from.

    Raises:
        BatchError: the graphs differ in something that does not follow from the size of the batch.
    """
    _Generaliser(model.graph, other.graph, places).run()
    RemoveUnusedNodesPass()(model)


def places_of(lowered: Lowered) -> dict[str, fx.Node]:
    """Nodes of a program by the names of their values in the graph that was made of it."""
    nodes = {node.name: node for node in lowered.program.graph.nodes}
    values = [value for value in lowered.program.graph_signature.user_outputs if isinstance(value, str)]
    return {**nodes, **{name: nodes[value] for name, value in zip(lowered.output_names, values, strict=True)}}


class _Generaliser:
    def __init__(self, graph: ir.Graph, other: ir.Graph, places: Mapping[str, fx.Node]) -> None:
        self._graph, self._other, self._places = graph, other, places
        shapes = ((one, _shape(one), _shape(two)) for one, two in zip(graph.inputs, other.inputs, strict=True))
        batched, first, second = next(each for each in shapes if each[1] != each[2])
        self._batches = first[0], second[0]
        self._emit = _Emitter(graph, batched)
        self._values: dict[ir.Value, ir.Value] = {}
        """Computed values of the other graph, and their counterparts."""
        self._varying: set[tuple[ir.Value, int]] = set()
        """Axes whose size depends on the batch, counted from the last."""

    def run(self) -> None:
        self._pair(self._graph, self._other)
        self._emit.insert()

    def _pair(self, graph: ir.Graph, other: ir.Graph) -> None:
        """Go through the nodes of two graphs, or of two bodies, in their order, which is the same if they are."""
        for one, two in zip(graph.inputs, other.inputs, strict=True):
            self._match(one, two)
        nodes, others = list(graph), list(other)
        for one, two in zip(nodes, others, strict=False):
            if _form(one) != _form(two):
                raise self._error(one)
            for index in range(len(one.inputs)):
                self._input(one, two, index)
            for name, mine in one.attributes.items():
                if mine.type == ir.AttributeType.GRAPH:
                    self._pair(mine.as_graph(), two.attributes[name].as_graph())
            for mine, theirs in zip(one.outputs, two.outputs, strict=True):
                self._match(mine, theirs)
        if len(nodes) != len(others):
            raise self._error(max(nodes, others, key=len)[min(len(nodes), len(others))])
        for one, two in zip(graph.outputs, other.outputs, strict=True):
            if self._values.get(two) is not one:
                raise self._error(nodes[-1])

    def _match(self, one: ir.Value, two: ir.Value) -> None:
        """Note that two values are one, and its shape for any batch."""
        self._values[two] = one
        if one.shape is None or two.shape is None or len(one.shape) != len(two.shape):
            one.shape = None
            return
        first, second = self._batches
        sizes: list[int | ir.SymbolicDim] = list(_shape(one))
        for axis, (mine, theirs) in enumerate(zip(_shape(one), _shape(two), strict=True)):
            if mine != theirs:
                self._varying.add((one, axis - len(sizes)))
                unit = mine // first
                known = (mine, theirs) == (unit * first, unit * second)
                sizes[axis] = ir.SymbolicDim((BATCH if unit == 1 else f"{unit}*{BATCH}") if known else None)
        one.shape = ir.Shape(sizes)

    def _input(self, one: ir.Node, two: ir.Node, index: int) -> None:
        mine, theirs = one.inputs[index], two.inputs[index]
        if mine is None or theirs is None:
            matches = mine is theirs
        elif mine.const_value is None or theirs.const_value is None:
            matches = self._values.get(theirs) is mine
        else:
            first, second = mine.const_value.numpy(), theirs.const_value.numpy()
            matches = first.dtype == second.dtype and first.ndim == second.ndim
            if matches and first.shape != second.shape:
                one.replace_input_with(index, self._rows(one, first, second))
            elif matches and not np.array_equal(first, second, equal_nan=first.dtype.kind == "f"):
                one.replace_input_with(index, self._sizes(one, index, first, second))
        if not matches:
            raise self._error(one)

    def _sizes(self, node: ir.Node, index: int, first: np.ndarray, second: np.ndarray) -> ir.Value:
        """A vector of which some elements are multiples of the batch, for any batch."""
        differs = first != second
        unit = np.where(differs, first // self._batches[0], 0)
        same = all(
            (unit * batch == np.where(differs, one, 0)).all()
            for batch, one in zip(self._batches, (first, second), strict=True)
        )
        if first.dtype != np.int64 or first.ndim != 1 or not same:
            raise self._error(node)
        if (node.op_type, index) == ("Reshape", 1) and differs.sum() == 1 and _REST not in first:
            return self._emit.constant(np.where(differs, _REST, first))
        return self._emit.sizes(np.where(differs, 0, first), unit)

    def _rows(self, node: ir.Node, first: np.ndarray, second: np.ndarray) -> ir.Value:
        """A constant that has the same rows, or rows in equal steps, for each sample, for any batch."""
        rows = _Rows.of(first, second, self._batches)
        if rows is None:
            raise self._error(node)
        if rows.step is not None:
            return self._emit.reshaped(self._emit.ramp(rows), rows.shape)
        if rows.row.ndim == first.ndim and node.op_type in _BROADCASTING:
            axis = rows.axis - first.ndim
            if any((value, axis) in self._varying for value in node.inputs if value is not None):
                return self._emit.constant(rows.row)
        return self._emit.reshaped(self._emit.expanded(rows), rows.shape)

    def _error(self, node: ir.Node) -> BatchError:
        first, second = self._batches
        return BatchError(
            f"the graph for a batch of {second} differs from that for {first} by more than the size: {node.op_type} at"
            f" {self._place(node)}; {FIXED}"
        )

    def _place(self, node: ir.Node) -> str:
        """Where the user's code asked for a node, or for the nearest that comes from it."""
        queue, seen = deque([node]), set()
        while queue:
            one = queue.popleft()
            for value in one.outputs:
                if value.name in self._places:
                    return source(self._places[value.name])
            near = [*one.successors(), *one.predecessors()]
            queue.extend(each for each in near if each not in seen)
            seen.update(near)
        return f"node {node.name}"


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A constant with something for each sample.

    Attributes:
        row: what the first sample has; the batch's axis has size 1.
        step: what each further sample has more, of the same shape; None if nothing.
        axis: the batch's.
        shape: of the constant itself, for Reshape: where some elements of one axis are each sample's, it is that axis.
    """

    row: np.ndarray
    step: np.ndarray | None
    axis: int
    shape: list[int]

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray, batches: tuple[int, int]) -> "_Rows | None":
        """Read the constants of two batches; None if there is no such reading."""
        differs = [axis for axis, (one, two) in enumerate(zip(first.shape, second.shape, strict=True)) if one != two]
        (axis, *others), unit = differs, first.shape[differs[0]] // batches[0]
        if others or (first.shape[axis], second.shape[axis]) != (unit * batches[0], unit * batches[1]):
            return None
        before, after = first.shape[:axis], first.shape[axis + 1 :]
        for inner in (0, 1) if unit > 1 else (0,):  # whether the batch is the outer or the inner part of the axis
            split = [
                content.reshape(*before, *_part(batch, unit, inner), *after)
                for content, batch in zip((first, second), batches, strict=True)
            ]
            row, following = np.split(split[1], range(1, batches[1]), axis + inner)[:2]
            steps = [None, following - row] if row.dtype.kind == "i" else [None]
            for step in steps:
                if all(np.array_equal(_rows_of(row, step, axis + inner, part.shape), part) for part in split):
                    return cls(row, step, axis + inner, [*before, _REST, *after])
        return None


def _part(batch: int, unit: int, inner: int) -> tuple[int, ...]:
    return (batch,) if unit == 1 else (unit, batch) if inner else (batch, unit)


def _rows_of(row: np.ndarray, step: np.ndarray | None, axis: int, shape: tuple[int, ...]) -> np.ndarray:
    if step is None:
        return np.broadcast_to(row, shape)
    ramp = np.arange(shape[axis]).reshape([-1 if position == axis else 1 for position in range(len(shape))])
    return row + step * ramp


class _Emitter:
    """Writes what follows from the size of the batch, in front of a graph's nodes, each once."""

    def __init__(self, graph: ir.Graph, batched: ir.Value) -> None:
        self._graph, self._batched = graph, batched
        self._nodes: list[ir.Node] = []
        self._made: dict[tuple[object, ...], ir.Value] = {}

    def insert(self) -> None:
        self._graph.insert_before(self._graph[0], self._nodes)

    def constant(self, content: np.ndarray) -> ir.Value:
        key = content.dtype, content.shape, content.tobytes()
        if key not in self._made:
            name = f"{BATCH}.constant_{len(self._made)}"
            tensor = ir.tensor(np.ascontiguousarray(content), name=name)
            value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            self._graph.register_initializer(value)
            self._made[key] = value
        return self._made[key]

    def sizes(self, fixed: np.ndarray, unit: np.ndarray) -> ir.Value:
        """fixed + unit · n, two vectors."""
        size = self._op("Shape", self._batched, dtype=ir.DataType.INT64, shape=[1], start=0, end=1)
        product = self._op("Mul", size, self.constant(unit), dtype=ir.DataType.INT64, shape=unit.shape)
        return self._op("Add", product, self.constant(fixed), dtype=ir.DataType.INT64, shape=unit.shape)

    def expanded(self, rows: _Rows) -> ir.Value:
        """One row for each sample."""
        unit = np.arange(rows.row.ndim) == rows.axis
        sizes = self.sizes(np.where(unit, 0, rows.row.shape), unit.astype(np.int64))
        return self._op("Expand", self.constant(rows.row), sizes, dtype=_dtype(rows.row), shape=_free(rows))

    def ramp(self, rows: _Rows) -> ir.Value:
        """The first row, and for each further sample a step more."""
        assert rows.step is not None
        scalar = ir.DataType.INT64
        size = self._op("Squeeze", self.sizes(np.array([0]), np.array([1])), dtype=scalar, shape=[])
        count = self._op(
            "Range", self.constant(np.array(0)), size, self.constant(np.array(1)), dtype=scalar, shape=[BATCH]
        )
        column = self.reshaped(count, [_REST, *(1 for _ in range(rows.row.ndim - rows.axis - 1))])
        column = self._op("Cast", column, dtype=_dtype(rows.row), shape=column.shape, to=_dtype(rows.row))
        product = self._op("Mul", column, self.constant(rows.step), dtype=column.dtype, shape=_free(rows))
        return self._op("Add", product, self.constant(rows.row), dtype=column.dtype, shape=_free(rows))

    def reshaped(self, value: ir.Value, shape: list[int]) -> ir.Value:
        if value.shape is not None and len(value.shape) == len(shape):
            return value
        free = [ir.SymbolicDim(None) if size == _REST else size for size in shape]
        return self._op("Reshape", value, self.constant(np.array(shape)), dtype=value.dtype, shape=free)

    def _op(
        self, op_type: str, *inputs: ir.Value, dtype: ir.DataType | None, shape: Iterable[object], **attributes: object
    ) -> ir.Value:
        key = op_type, *inputs, *attributes.items()
        if key not in self._made:
            node = ir.node(op_type, inputs, attributes)
            value = node.outputs[0]
            value.name, value.type, value.shape = (
                f"{BATCH}.{op_type.lower()}_{len(self._made)}",
                ir.TensorType(dtype),
                ir.Shape(shape),
            )
            self._nodes.append(node)
            self._made[key] = value
        return self._made[key]


def _free(rows: _Rows) -> list[int | str]:
    return [BATCH if axis == rows.axis else size for axis, size in enumerate(rows.row.shape)]


def _dtype(content: np.ndarray) -> ir.DataType:
    return ir.DataType.from_numpy(content.dtype)


def _form(node: ir.Node) -> tuple[object, ...]:
    """What two nodes must have in common beside their inputs."""
    attributes = {
        name: None if attribute.type == ir.AttributeType.GRAPH else ir.to_proto(attribute).SerializeToString()
        for name, attribute in node.attributes.items()
    }
    return node.op_identifier(), len(node.inputs), len(node.outputs), attributes


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape)
