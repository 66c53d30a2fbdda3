"""Float16 and bfloat16 graphs: half the bytes, for runtimes on phones and GPUs that compute in them."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from mobilemix.passes.editing import WIDE

WIDE_OPERATORS = ("InstanceNormalization", "ReduceMean", "ReduceSum", "GlobalAveragePool", "Softmax", "Scan")
"""Operators that sum many values, which 16-bit sums would round or overflow; LayerNormalization sums in float32.

Besides these, what a pass has marked by a name that begins with `mobilemix.passes.editing.WIDE`.
"""

NO_BFLOAT16 = frozenset(
    {
        *("DeformConv", "GridSample", "HardSwish", "LpNormalization", "Mish", "NonMaxSuppression", "NonZero"),
        *("RoiAlign", "Shrink"),
    }
)
"""What NVIDIA's parser takes in float16 and not in bfloat16, by its list for TensorRT 10.0 and by trying RTX 1.7."""

SUFFIXES = (".full", ".half")
"""What the name of a value's other form ends in."""

_FULL = ir.DataType.FLOAT
_TYPES = {ir.DataType.FLOAT16: "tensor(float16)", ir.DataType.BFLOAT16: "tensor(bfloat16)"}
"""What the standard calls them."""


def halve(model: ir.Model, dtype: ir.DataType = ir.DataType.FLOAT16) -> None:
    """Convert weights and arithmetic to 16 bits, rounding to nearest; inputs and outputs stay float32.

    Before:   x → Conv(w) → Softmax → y
    After:    x → Cast → Conv(w.half) → Cast → Softmax → y

    What the standard does not define for the type at the model's opset stays float32 (convolutions and pooling have
    bfloat16 from opset 22), and so does `NO_BFLOAT16`.

    Args:
        model: float32; changed in place.
        dtype: FLOAT16 or BFLOAT16.
    """
    forms = _Forms(model.graph)
    for node in list(model.graph):
        schema = onnx.defs.get_schema(node.op_type, model.opset_imports[""], node.domain)
        wide = node.op_type in WIDE_OPERATORS or str(node.outputs[0].name).startswith(WIDE)
        wide |= dtype == ir.DataType.BFLOAT16 and node.op_type in NO_BFLOAT16
        halved = set()
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (_FULL, dtype):
                continue
            parameter = _parameter(schema.inputs, index)
            half = not wide and _TYPES[dtype] in parameter.types
            node.replace_input_with(index, forms.get(value, dtype if half else _FULL))
            if half:
                halved.add(parameter.type_str)
        for index, value in enumerate(node.outputs):
            # An output has the type of the inputs with which it shares a type variable.
            if value.dtype == _FULL and _parameter(schema.outputs, index).type_str in halved:
                value.dtype = dtype
    for inner in (node for body in model.graph.subgraphs() for node in body):
        for index, value in enumerate(inner.inputs):  # of the graph around a body, which stays as it is
            if value is not None and value.dtype == dtype:
                inner.replace_input_with(index, forms.get(value, _FULL))
    for index, value in enumerate(model.graph.outputs):
        if value.dtype == dtype:
            full, name = forms.get(value, _FULL), value.name
            value.name, full.name = f"{name}.half", name
            model.graph.outputs[index] = full
    RemoveUnusedNodesPass()(model)


def to_half(content: np.ndarray, dtype: ir.DataType = ir.DataType.FLOAT16) -> np.ndarray:
    """Round to nearest; what is beyond the type is a mask or a bound, which its largest number is as well."""
    return np.where(np.isfinite(content), np.clip(content, dtype.min, dtype.max), content).astype(dtype.numpy())


class _Forms:
    """The float32 and 16-bit forms of a graph's values, made when asked for and once."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def get(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._made:
            self._made[value, dtype] = (
                self._constant(value, dtype) if value.const_value is not None else self._cast(value, dtype)
            )
        return self._made[value, dtype]

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        half = to_half(value.const_value.numpy(), dtype)
        name = f"{value.name}.half"
        made = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape, const_value=ir.tensor(half, name=name))
        self._graph.register_initializer(made)
        return made

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        node = ir.node("Cast", [value], {"to": dtype})
        (made,) = node.outputs
        made.name = f"{value.name}.{'full' if dtype == _FULL else 'half'}"
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
