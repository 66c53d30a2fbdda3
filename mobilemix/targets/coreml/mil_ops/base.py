"""The table of operator rules and what they share.

A rule is a function named and parametrised as the MIL operation is, defaults included, that computes the outputs from
torch tensors: float32 for every MIL float, int64 for every MIL integer, bool; strings are `str`, and a list parameter
(annotated `Tensors`) is a list. Semantics are those of the MIL operator definitions that coremltools publishes
(`coremltools.converters.mil.mil.ops.defs`, iOS 15 to iOS 18); a parameter that only newer versions have is optional.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

Compute = TypeVar("Compute", bound=Callable[..., Any])
Tensors = Sequence[Tensor]
DTypes = Mapping[str, str]
Result = Callable[[DTypes, Mapping[str, Any]], str | tuple[str, ...] | None]
"""Data types of the outputs from the inputs' types and values: one for all, one each, or None if they do not tell."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one operation type is executed.

    Attributes:
        compute: the function of the operation's parameters.
        result: the data types that its outputs must be declared with.
        lists: the parameters that are lists.
    """

    compute: Callable[..., Any]
    result: Result
    lists: frozenset[str]


RULES: dict[str, Rule] = {}
"""Every rule by operation type; complete once `mobilemix.targets.coreml.mil_ops` is imported."""


def rule(*types: str, result: Result | None = None) -> Callable[[Compute], Compute]:
    """Enter a function in `RULES` under `types`; by default its outputs have the first parameter's data type."""

    def register(compute: Compute) -> Compute:
        parameters = inspect.signature(compute).parameters
        lists = frozenset(name for name, parameter in parameters.items() if parameter.annotation == Tensors)
        entry = Rule(compute, result or like(next(iter(parameters))), lists)
        for each in types:
            if each in RULES:
                raise ValueError(f"two rules for '{each}'")
            RULES[each] = entry
        return compute

    return register


def like(parameter: str, absent: str | None = None) -> Result:
    """Outputs of the data type of `parameter`, or `absent` where it is left to its default."""
    return lambda dtypes, _: dtypes.get(parameter, absent)


def always(dtype: str) -> Result:
    """Outputs of one data type whatever the inputs are."""
    return lambda _dtypes, _values: dtype


def named(parameter: str, default: str | None = None) -> Result:
    """Outputs of the data type whose name is the value of `parameter`."""
    return lambda _, values: values.get(parameter, default)


def ints(values: Tensor) -> list[int]:
    """A tensor of integers as a flat list."""
    return [int(value) for value in values.flatten().tolist()]


def channelwise(values: Tensor, rank: int) -> Tensor:
    """Shape (C,) to (C, 1, …), which broadcasts along axis 1 of a tensor of `rank`."""
    return values.reshape(-1, *[1] * (rank - 2))


def along(values: Tensor, axis: Tensor | None, rank: int) -> Tensor:
    """A scalar, or a vector shaped to broadcast along `axis` of a tensor of `rank`."""
    if values.ndim == 0 or axis is None:
        return values
    shape = [1] * rank
    shape[int(axis)] = -1
    return values.reshape(shape)
