"""The table of operator rules and what they share.

A rule computes the outputs of an operator from torch tensors: positional parameters are the operator's inputs, those
that may be absent None by default, and keyword parameters its attributes, with the standard's names and defaults.
Semantics are those of the operators as of opset 18 to 22 (https://onnx.ai/onnx/operators/). Floating-point tensors are
of one dtype, whatever the file declares; a rule that makes some of nothing takes it as `wide`. Integers keep theirs.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

Compute = TypeVar("Compute", bound=Callable[..., Any])

RULES: dict[str, Callable[..., Any]] = {}
"""Every rule by operator type; complete once `mobilemix.targets.onnx.onnx_ops` is imported."""

SEVERAL = frozenset({"DynamicQuantizeLinear", "Scan", "Split"})
"""Operators whose rule gives a sequence of outputs; the others give the first, all that inference needs."""


def rule(*types: str) -> Callable[[Compute], Compute]:
    """Enter a function in `RULES` under `types`."""

    def register(compute: Compute) -> Compute:
        for each in types:
            if each in RULES:
                raise ValueError(f"two rules for '{each}'")
            RULES[each] = compute
        return compute

    return register


def keywords(compute: Callable[..., Any]) -> set[str]:
    """Names of the keyword parameters of a rule."""
    parameters = inspect.signature(compute).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY}


def ints(values: Tensor) -> list[int]:
    """A tensor of integers as a flat list."""
    return [int(value) for value in values.flatten().tolist()]


def channelwise(values: Tensor, rank: int) -> Tensor:
    """Shape (C,) to (C, 1, …), which broadcasts along axis 1 of a tensor of `rank`."""
    return values.reshape(-1, *[1] * (rank - 2))


def every(axes: Tensor | None, rank: int) -> list[int]:
    """Axes as numbers from 0; all of them if none are given."""
    return sorted(axis % rank for axis in ints(axes)) if axes is not None and axes.numel() else list(range(rank))
