"""The table of rules: one small function for each operator, or for a few that are alike."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from mobilemix.passes.complex_to_real.values import Real, emit
from mobilemix.passes.editing import Edit

Rule = Callable[..., Any]

RULES: dict[str, Rule] = {}
"""By the name of an operator without its overload, "aten::mul"."""


@dataclasses.dataclass(frozen=True)
class Call:
    """The call that a rule rewrites.

    Attributes:
        edit: where to make nodes; already placed before the call.
        op: the operator.
        value: fake tensor (or tuple of them) that the call returns: its shape and complex dtype.
        real_only: whether nothing uses the imaginary part of the result.
    """

    edit: Edit
    op: torch._ops.OpOverload
    value: Any
    real_only: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return tuple(self.value.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Real dtype of the result's parts."""
        return real_dtype(self.value.dtype)

    def emit(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Real:
        """A node that calls `op` on real tensors."""
        return emit(self.edit, op, *args, **kwargs)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the parts of a tensor of `dtype`."""
    return dtype.to_real() if dtype.is_complex else dtype


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators by name.

    The rule is called as rule(call, *args, **kwargs) with the arguments of the operator, in which real tensors are
    `Real` and complex ones `Complex`, and returns the like (a list for an operator with several results).
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[f"aten::{name}"] = function
        return function

    return register
