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
