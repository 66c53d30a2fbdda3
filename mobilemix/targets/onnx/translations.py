"""ATen operators that have a short ONNX form when all shapes are known, where torchlib has a general one or none.

An operator in the table is not decomposed before translation, so each also keeps its value's name (see `translate`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset18 as op

from mobilemix.targets.onnx import scans

aten = torch.ops.aten


def reshape(x: Any, shape: Sequence[int]) -> Any:
    """Elements in order, in another shape; one size may be −1."""
    known = math.prod(size for size in shape if size != -1)
    return _shaped(x, [math.prod(x.shape) // known if size == -1 else size for size in shape])


def _shaped(x: Any, shape: Sequence[int]) -> Any:
    return op.Reshape(x, op.Constant(value_ints=list(shape)))


def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    """Axes from start to end (inclusive) as one."""
    start, end = start_dim % len(x.shape), end_dim % len(x.shape)
    return reshape(x, [*x.shape[:start], math.prod(x.shape[start : end + 1]), *x.shape[end + 1 :]])


def unflatten(x: Any, dim: int, sizes: Sequence[int]) -> Any:
    """One axis as several; one of their sizes may be −1."""
    axis = dim % len(x.shape)
    return reshape(x, [*x.shape[:axis], *sizes, *x.shape[axis + 1 :]])


def split(x: Any, split_size: int, dim: int = 0) -> Sequence[Any]:
    """Parts of one size, the last one smaller."""
    size = x.shape[dim]
    return split_with_sizes(x, [min(split_size, size - start) for start in range(0, size, split_size)], dim)


def chunk(x: Any, chunks: int, dim: int = 0) -> Sequence[Any]:
    """At most `chunks` parts of one size, the last one smaller."""
    return split(x, -(-x.shape[dim] // chunks), dim)


def split_with_sizes(x: Any, split_sizes: Sequence[int], dim: int = 0) -> Sequence[Any]:
    """One Split, whose outputs keep their names, rather than a sequence of tensors.

    The exporter needs `num_outputs` to trace, the operator takes it or the sizes: `finish` removes it.
    """
    if len(split_sizes) == 1:
        return (op.Identity(x),)
    sizes = op.Constant(value_ints=list(split_sizes))
    parts: Sequence[Any] = op.Split(x, sizes, axis=dim, num_outputs=len(split_sizes))
    return parts


def adaptive_avg_pool2d(x: Any, output_size: Sequence[int]) -> Any:
    """Mean of each cell of a grid.

    Cells of one size are a pool; others, which overlap, are one matrix for the rows and one for the columns.
    """
    pairs = list(zip(x.shape[-2:], output_size, strict=True))
    if tuple(output_size) == (1, 1):  # a rewrite makes a pool of it where the rank allows
        return op.ReduceMean(x, op.Constant(value_ints=[-2, -1]), keepdims=1)
    if len(x.shape) == 4 and all(size % count == 0 for size, count in pairs):
        cell = [size // count for size, count in pairs]
        return op.AveragePool(x, kernel_shape=cell, strides=cell)
    rows, columns = (op.Constant(value=ir.tensor(_cell_weights(size, count))) for size, count in pairs)
    return op.MatMul(op.MatMul(rows, x), op.Transpose(columns, perm=[1, 0]))


def _cell_weights(size: int, count: int) -> np.ndarray:
    """Weight of each input in each output of an adaptive mean, (count, size)."""
    weights = np.zeros((count, size), np.float32)
    for cell in range(count):
        start, stop = cell * size // count, -(-(cell + 1) * size // count)
        weights[cell, start:stop] = 1 / (stop - start)
    return weights


def batch_norm(x: Any, weight: Any, bias: Any, mean: Any, variance: Any, *options: Any) -> Any:
    """Evaluation mode; options are (training, momentum, eps, cudnn_enabled)."""
    channels = (x.shape[1],)
    scale = op.Constant(value=ir.tensor(np.ones(channels, np.float32))) if weight is None else weight
    shift = op.Constant(value=ir.tensor(np.zeros(channels, np.float32))) if bias is None else bias
    return op.BatchNormalization(x, scale, shift, mean, variance, epsilon=options[2])


def group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,  # noqa: ARG001
) -> Any:
    """Instance norm of the groups, then the affine map of the channels.

    The operator that opset 21 has is spelled out by ONNX Runtime in 27 nodes for these five.
    """
    grouped = reshape(x, [x.shape[0], num_groups, -1])
    ones, zeros = (op.Constant(value=ir.tensor(np.full(num_groups, fill, np.float32))) for fill in (1, 0))
    result = _shaped(op.InstanceNormalization(grouped, ones, zeros, epsilon=eps), x.shape)
    channels = [x.shape[1], *(1 for _ in x.shape[2:])]
    if weight is not None:
        result = op.Mul(result, _shaped(weight, channels))
    return result if bias is None else op.Add(result, _shaped(bias, channels))


def square(x: Any) -> Any:
    """x·x."""
    return op.Mul(x, x)


def rsub(x: Any, other: float, alpha: float = 1) -> Any:
    """other − alpha·x."""
    scaled = x if alpha == 1 else op.Mul(x, op.Constant(value=ir.tensor(alpha, dtype=x.dtype)))
    return op.Sub(op.Constant(value=ir.tensor(other, dtype=x.dtype)), scaled)


def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:  # noqa: ARG001, the operator is exact beyond it
    """log(1 + exp(β·x)) / β."""
    if beta == 1:
        return op.Softplus(x)
    factor = op.Constant(value=ir.tensor(beta, dtype=x.dtype))
    return op.Div(op.Softplus(op.Mul(x, factor)), factor)


def finish(model: ir.Model) -> None:
    """Make valid ONNX of what the translations had to write differently to be traced."""
    for node in model.graph:
        if node.op_type == "Split" and len(node.inputs) == 2:
            node.attributes.pop("num_outputs", None)


TRANSLATIONS: Mapping[Any, Callable[..., Any]] = {
    aten.view.default: reshape,
    aten.reshape.default: reshape,
    aten.flatten.using_ints: flatten,
    aten.unflatten.int: unflatten,
    aten.split.Tensor: split,
    aten.split_with_sizes.default: split_with_sizes,
    aten.chunk.default: chunk,
    aten.adaptive_avg_pool2d.default: adaptive_avg_pool2d,
    aten.batch_norm.default: batch_norm,
    aten.group_norm.default: group_norm,
    aten.square.default: square,
    aten.rsub.Scalar: rsub,
    aten.softplus.default: softplus,
    torch.ops.mobilemix.selective_scan.default: scans.selective_scan,
    torch.ops.mobilemix.linear_scan.default: scans.linear_scan,
}
