"""Corrections of coremltools' readers of PyTorch operators; importing this module registers them."""

from typing import Any

from coremltools.converters.mil import Builder as mb  # noqa: N813, its name everywhere
from coremltools.converters.mil.frontend.torch.ops import _get_inputs, _get_kwinputs
from coremltools.converters.mil.frontend.torch.torch_op_registry import register_torch_op


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
