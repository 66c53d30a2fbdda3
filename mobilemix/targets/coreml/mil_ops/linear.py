"""Matrix products and attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.targets.coreml.mil_ops.base import DTypes, Tensors, rule


def _flag(value: Tensor | None) -> bool:
    return value is not None and bool(value)


def _unless_mixed(dtypes: DTypes, _: object) -> str | None:
    """From iOS 17 on a constant operand may have another type than the result; which one is constant is not known."""
    return dtypes["x"] if dtypes["x"] == dtypes["y"] else None


@rule("linear")
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (*D, I) · weight (O, I)ᵀ + bias (O,)."""
    return F.linear(x, weight, bias)


@rule("matmul", result=_unless_mixed)
def matmul(x: Tensor, y: Tensor, transpose_x: Tensor | None = None, transpose_y: Tensor | None = None) -> Tensor:
    """Batched product over the last two axes; a transpose has no effect on a vector."""
    x = x.mT if _flag(transpose_x) and x.ndim > 1 else x
    y = y.mT if _flag(transpose_y) and y.ndim > 1 else y
    return x @ y


@rule("einsum")
def einsum(values: Tensors, equation: str) -> Tensor:
    """Einsum in which axes of size 1 broadcast."""
    return torch.einsum(equation, *values)


@rule("scaled_dot_product_attention")
def scaled_dot_product_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """softmax(query · keyᵀ / √E + mask) · value; a boolean mask keeps where it is true."""
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1) @ value
