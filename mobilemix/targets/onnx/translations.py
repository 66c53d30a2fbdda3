"""ATen operators whose stock ONNX form is clumsy when all shapes are known, translated directly."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op

aten = torch.ops.aten


def split(x: Any, split_size: int, dim: int = 0) -> Sequence[Any]:
    """Parts of one size, the last one shorter."""
    size = x.shape[dim]
    return split_with_sizes(x, [min(split_size, size - start) for start in range(0, size, split_size)], dim)


def split_with_sizes(x: Any, split_sizes: Sequence[int], dim: int = 0) -> Sequence[Any]:
    """One Split, whose outputs keep their names, rather than a sequence of tensors.

    The exporter needs `num_outputs` to trace, the operator takes it or the sizes: `finish` removes it.
    """
    if len(split_sizes) == 1:
        return (op.Identity(x),)
    parts: Sequence[Any] = op.Split(
        x, op.Constant(value_ints=list(split_sizes)), axis=dim, num_outputs=len(split_sizes)
    )
    return parts


def finish(model: ir.Model) -> None:
    """Make valid ONNX of what the translations had to write differently to be traced."""
    for node in model.graph:
        if node.op_type == "Split" and len(node.inputs) == 2:
            node.attributes.pop("num_outputs", None)


TRANSLATIONS: Mapping[Any, Callable[..., Any]] = {
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split_with_sizes,
}
