"""Float16 graphs: half the bytes, for runtimes on phones and GPUs that compute in it."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mobilemix.passes.editing import WIDE

WIDE_OPERATORS = ("InstanceNormalization", "ReduceMean", "ReduceSum", "GlobalAveragePool", "Softmax", "Scan")
"""Operators that sum many values, which float16 sums would round or overflow; LayerNormalization sums in float32.

Besides these, what a pass has marked by a name that begins with `mobilemix.passes.editing.WIDE`.
"""

LARGEST = float(np.finfo(np.float16).max)
SUFFIXES = (".full", ".half")
"""What the name of a value's other form ends in."""

_FULL, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def halve(model: ir.Model) -> None:
    """Convert weights and arithmetic to float16, rounding to nearest; inputs and outputs stay float32.

    Before:   x → Conv(w) → Softmax → y
    After:    x → Cast → Conv(w.half) → Cast → Softmax → y
    """
    forms = _Forms(model.graph)
    for node in list(model.graph):
        schema = onnx.defs.get_schema(node.op_type, model.opset_imports[""], node.domain)
        wide = node.op_type in WIDE_OPERATORS or str(node.outputs[0].name).startswith(WIDE)
        halved = set()
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (_FULL, _HALF):
                continue
            parameter = _parameter(schema.inputs, index)
            half = not wide and "tensor(float16)" in parameter.types
            node.replace_input_with(index, forms.get(value, _HALF if half else _FULL))
            if half:
                halved.add(parameter.type_str)
        for index, value in enumerate(node.outputs):
            # An output has the type of the inputs with which it shares a type variable.
            if value.dtype == _FULL and _parameter(schema.outputs, index).type_str in halved:
                value.dtype = _HALF
    for inner in (node for body in model.graph.subgraphs() for node in body):
        for index, value in enumerate(inner.inputs):  # of the graph around a body, which stays as it is
            if value is not None and value.dtype == _HALF:
                inner.replace_input_with(index, forms.get(value, _FULL))
    for index, value in enumerate(model.graph.outputs):
        if value.dtype == _HALF:
            full, name = forms.get(value, _FULL), value.name
            value.name, full.name = f"{name}.half", name
            model.graph.outputs[index] = full
    RemoveUnusedNodesPass()(model)


def to_half(content: np.ndarray) -> np.ndarray:
    """Round to nearest; what is beyond float16 is a mask or a bound, which its largest number is as well."""
    return np.where(np.isfinite(content), np.clip(content, -LARGEST, LARGEST), content).astype(np.float16)


class _Forms:
    """The float32 and float16 forms of a graph's values, made when asked for and once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def get(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._made:
            self._made[value, dtype] = (
                self._constant(value) if value.const_value is not None else self._cast(value, dtype)
            )
        return self._made[value, dtype]

    def _constant(self, value: ir.Value) -> ir.Value:
        half = to_half(value.const_value.numpy())
        name = f"{value.name}.half"
        made = ir.Value(name=name, type=ir.TensorType(_HALF), shape=value.shape, const_value=ir.tensor(half, name=name))
        self._graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = ir.node("Cast", [value], {"to": dtype})
        (made,) = node.outputs
        made.name = f"{value.name}.{'half' if dtype == _HALF else 'full'}"
        made.type, made.shape = ir.TensorType(dtype), value.shape
        if (producer := value.producer()) is not None:
            self._graph.insert_after(producer, node)
        else:
            self._graph.insert_before(self._graph[0], node)
        return made


def _parameter(
    parameters: Sequence[onnx.defs.OpSchema.FormalParameter], index: int
) -> onnx.defs.OpSchema.FormalParameter:
    """The formal parameter of an actual one; the last may be variadic."""
    return parameters[min(index, len(parameters) - 1)]
