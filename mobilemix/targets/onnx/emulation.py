"""bfloat16 graphs on a CPU: the arithmetic in float32, every result rounded to bfloat16."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

EXACT = ".exact"
"""What the name of a result ends in before it is rounded."""

_MOVES = frozenset({"Concat", "Expand", "Flatten", "Gather", "Identity", "Relu", "Reshape", "Slice", "Split"})
_MOVES |= {"Squeeze", "Transpose", "Unsqueeze"}
"""Operators whose results are among what they read, and 0: rounded already."""


def is_needed(model: onnx.ModelProto) -> bool:
    """Whether a model computes in bfloat16, for which ONNX Runtime has next to no kernels on a CPU."""
    return any(node.op_type == "Cast" and _is_bfloat16(node) for node in model.graph.node)


def emulate(model: onnx.ModelProto, folder: Path) -> None:
    """Let a bfloat16 model compute in float32, in place, and round what a node computes where it was bfloat16.

    Before:   x (bfloat16) → Conv(w, bfloat16) → y (bfloat16)
    After:    x (float32) → Conv(w, float32) → y.exact → Cast(bfloat16) → Cast(float32) → y

    That is what kernels for bfloat16 compute: sums in float32, one rounding of the result.

    Args:
        model: types of its values are stated.
        folder: where the file with its weights is, if they are not in the model.
    """
    onnx.load_external_data_for_model(model, str(folder))
    graph = model.graph
    described = (*graph.value_info, *graph.input, *graph.output)
    narrow = {value.name for value in described if value.type.tensor_type.elem_type == TensorProto.BFLOAT16}
    for value in described:
        if value.name in narrow:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    nodes = [made for node in graph.node for made in _rounded(node, narrow)]
    del graph.node[:]
    graph.node.extend(nodes)


def _rounded(node: onnx.NodeProto, narrow: set[str]) -> Iterator[onnx.NodeProto]:
    """A node in float32, and the roundings of its results."""
    results = [name for name in node.output if name in narrow]
    if node.op_type == "Cast" and results:  # from float32, which is the same as an exact result
        yield from _round(node.input[0], results[0])
        return
    if not results or node.op_type in _MOVES:
        yield node
        return
    node.output[:] = [name + EXACT if name in narrow else name for name in node.output]
    yield node
    for name in results:
        yield from _round(name + EXACT, name)


def _round(exact: str, name: str) -> Iterator[onnx.NodeProto]:
    yield helper.make_node("Cast", [exact], [f"{name}.rounded"], to=TensorProto.BFLOAT16)
    yield helper.make_node("Cast", [f"{name}.rounded"], [name], to=TensorProto.FLOAT)


def _is_bfloat16(cast: onnx.NodeProto) -> bool:
    return any(attribute.name == "to" and attribute.i == TensorProto.BFLOAT16 for attribute in cast.attribute)
