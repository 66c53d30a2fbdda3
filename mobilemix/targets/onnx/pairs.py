"""QuantizeLinear and DequantizeLinear pairs in an ONNX graph: the 8-bit forms of its values, made once for each."""

from collections.abc import Collection, Sequence

import onnx_ir as ir

from mobilemix.targets.base import Array

QUANTISED, DEQUANTISED = ".quantised", ".dequantised"
"""What the names of a value's other forms end in."""
SCALE, ZERO = ".scale", ".zero"
"""What the names of a form's parameters end in."""


OWN = "@"
"""Between the name of a constant and that of the value that its copy is for."""


def own(value: ir.Value, node: ir.Node) -> str:
    """Name of a constant's copy for one of the nodes that read it."""
    return f"{value.name}{OWN}{node.outputs[0].name}"


class Pairs:
    """Makes the forms of a graph's values; nodes are put in front of `before`, constants are shared by name."""

    def __init__(self, graph: ir.Graph) -> None:
        """None is made yet."""
        self._graph = graph

    def parameters(self, name: str, scale: Array, zero: Array) -> tuple[ir.Value, ir.Value]:
        """Scale and zero point of the value of this name, and of all that is moved from it."""
        return self.constant(f"{name}{SCALE}", scale), self.constant(f"{name}{ZERO}", zero)

    def of_value(
        self, value: ir.Value, scale: ir.Value, zero: ir.Value, before: ir.Node, *, centred: bool = False
    ) -> ir.Value:
        """Round a computed value and read it again; `centred` leaves a zero point of 0 unsaid there.

        Before:   value
        After:    value → QuantizeLinear(scale, zero) → DequantizeLinear(scale, zero)
        """
        node = ir.node("QuantizeLinear", [value, scale, zero])
        numbers = self.add(node, f"{value.name}{QUANTISED}", value.shape, before, zero.dtype)
        return self.read(numbers, scale, None if centred else zero, str(value.name), before)

    def of_constant(
        self,
        name: str,
        numbers: Array | ir.TensorProtocol,
        scale: Array,
        zero: Array | None,
        before: ir.Node,
        **attributes: int,
    ) -> ir.Value:
        """Read integers that are in the file; `attributes` are those of DequantizeLinear."""
        held = self.constant(f"{name}{QUANTISED}", numbers)
        zeros = None if zero is None else self.constant(f"{name}{ZERO}", zero)
        return self.read(held, self.constant(f"{name}{SCALE}", scale), zeros, name, before, **attributes)

    def read(
        self, numbers: ir.Value, scale: ir.Value, zero: ir.Value | None, name: str, before: ir.Node, **attributes: int
    ) -> ir.Value:
        """Dequantise."""
        node = ir.node("DequantizeLinear", [numbers, scale, *([] if zero is None else [zero])], attributes)
        return self.add(node, f"{name}{DEQUANTISED}", numbers.shape, before, scale.dtype)

    def constant(self, name: str, content: Array | ir.TensorProtocol) -> ir.Value:
        """A constant of the graph, made unless there is one of that name."""
        if name not in self._graph.initializers:
            tensor = ir.tensor(content, name=name)
            made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            self._graph.register_initializer(made)
        return self._graph.initializers[name]

    def add(
        self,
        node: ir.Node,
        name: str,
        shape: ir.Shape | Sequence[int] | None,
        before: ir.Node,
        dtype: ir.DataType | None = ir.DataType.FLOAT,
    ) -> ir.Value:
        """Put a node of one output in front of another."""
        (made,) = node.outputs
        assert dtype is not None
        made.name, made.type = name, ir.TensorType(dtype)
        made.shape = shape if shape is None or isinstance(shape, ir.Shape) else ir.Shape(shape)
        self._graph.insert_before(before, node)
        return made


def name_nodes(graph: ir.Graph, known: Collection[ir.Node]) -> None:
    """Name every node `module/value`; what was put in front of a node, or behind the last, belongs to its module.

    Args:
        graph: changed in place.
        known: nodes that have their name.
    """
    modules = {node: str(node.name).rpartition("/")[0] for node in known}
    for node in reversed(graph):
        if node not in modules:
            neighbours = (
                *(user for user, _ in node.outputs[0].uses()),
                *(value.producer() for value in node.inputs[:1]),
            )
            modules[node] = next((modules[each] for each in neighbours if each in modules), "")
        value = str(node.outputs[0].name)
        node.name = f"{modules[node]}/{value}" if modules[node] else value
