"""Corrections of coremltools' readers of PyTorch operators; importing this module registers them."""

from typing import Any

import numpy as np
from coremltools.converters.mil import Builder as mb  # noqa: N813, its name everywhere
from coremltools.converters.mil.frontend.torch.ops import NUM_TO_DTYPE_STRING, _get_inputs, _get_kwinputs
from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op
from coremltools.converters.mil.mil import types


@register_torch_op(override=True)  # type: ignore[untyped-decorator]
def gelu(context: Any, node: Any) -> None:
    """`approximate` is a keyword argument, which the stock reader overlooks: it makes every GELU exact."""
    (x,) = _get_inputs(context, node, expected=1)
    approximate = _get_kwinputs(context, node, "approximate")
    is_tanh = approximate is not None and approximate[0] == "tanh"
    context.add(mb.gelu(x=x, mode="TANH_APPROXIMATION" if is_tanh else "EXACT", name=node.name))


@register_torch_op  # type: ignore[untyped-decorator]
def chunk(context: Any, node: Any) -> None:
    """The stock readers know it from TorchScript only: equal parts, but for a smaller last one."""
    x, count, *dim = _get_inputs(context, node, min_expected=2)
    axis = dim[0].val if dim else 0
    total = x.shape[axis]
    size = -(-total // count.val)
    sizes = [min(size, total - start) for start in range(0, total, size)]
    context.add(mb.split(x=x, split_sizes=sizes, axis=axis, name=node.name), torch_name=node.name)


@register_torch_op(override=True)  # type: ignore[untyped-decorator]
def group_norm(context: Any, node: Any) -> None:
    """One `layer_norm` instead of the stock reader's eight operations, whose squares leave fp16's range beyond 256."""
    inputs: list[Any] = _get_inputs(context, node, min_expected=2)
    x, groups, weight, bias, epsilon = inputs[:5] + [None] * (5 - len(inputs))
    weight = _get_kwinputs(context, node, "weight", default=[weight])[0]
    bias = _get_kwinputs(context, node, "bias", default=[bias])[0]
    epsilon = np.array(1e-5 if epsilon is None else epsilon.val, np.float32)
    batch, channels, *size = x.shape
    if groups.val == 1:
        result = mb.layer_norm(x=x, axes=list(range(1, x.rank)), epsilon=epsilon)
    else:
        grouped = mb.reshape(x=x, shape=(batch, groups.val, -1))
        result = mb.reshape(x=mb.layer_norm(x=grouped, axes=[2], epsilon=epsilon), shape=x.shape)
    by_channel = (channels, *(1 for _ in size))
    if weight is not None:
        result = mb.mul(x=result, y=mb.reshape(x=weight, shape=by_channel))
    if bias is not None:
        result = mb.add(x=result, y=mb.reshape(x=bias, shape=by_channel))
    context.add(result, torch_name=node.name)


@register_torch_op(override=True)  # type: ignore[untyped-decorator]
def cumsum(context: Any, node: Any) -> None:
    """The stock reader passes a negative axis on as it is; of these, the operation takes −1 alone."""
    x, axis, *dtype = _get_inputs(context, node, min_expected=2)
    (dtype,) = _get_kwinputs(context, node, "dtype", default=dtype or [None])
    if dtype is not None:
        x = mb.cast(x=x, dtype=NUM_TO_DTYPE_STRING[dtype.val])
    elif types.is_bool(x.dtype):
        x = mb.cast(x=x, dtype="int32")
    context.add(mb.cumsum(x=x, axis=axis.val % x.rank, name=node.name))


@register_torch_op(torch_alias=["prod.dim_int"])  # type: ignore[untyped-decorator]
def prod(context: Any, node: Any) -> None:
    """The product along one axis, which has no stock reader."""
    x, axis, *keep = _get_inputs(context, node, min_expected=2)
    keep_dims = bool(keep and keep[0].val)
    context.add(mb.reduce_prod(x=x, axes=[axis.val], keep_dims=keep_dims, name=node.name), torch_name=node.name)
