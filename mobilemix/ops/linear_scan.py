"""The first-order linear recurrence, elementwise: what a state-space model does over time."""

import torch
from torch import Tensor

from mobilemix.errors import InputError
from mobilemix.ops.reference import check_real, register_gradient, wide

_NAME = "linear_scan"


def linear_scan(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    """h_t = a_t · h_{t−1} + b_t for every t; time is the first axis.

    Args:
        a: decay, (l, *rest), where any axis but time may be 1.
        b: input, likewise.
        initial: h_{−1}, (*rest) or what broadcasts to it; None is 0.

    Returns:
        h, (l, *rest): the state after each step, in the widest dtype of the arguments.

    Raises:
        InputError: the shapes do not fit, or a tensor is not real.
    """
    result: Tensor = torch.ops.mobilemix.linear_scan(a, b, initial)
    return result


def _shape(a: Tensor, b: Tensor, initial: Tensor | None) -> tuple[int, ...]:
    check_real(_NAME, {"a": a, "b": b, "initial": initial})
    pairs = list(zip(a.shape, b.shape, strict=False))
    if a.dim() != b.dim() or not pairs or len(a) != len(b) or any(1 not in pair and len({*pair}) > 1 for pair in pairs):
        raise InputError(f"{_NAME} takes a and b of one shape, not {tuple(a.shape)} and {tuple(b.shape)}")
    shape = tuple(max(pair) if min(pair) else 0 for pair in pairs)
    if initial is not None:
        last = list(zip(reversed(initial.shape), reversed(shape[1:]), strict=False))
        if initial.dim() >= len(shape) or any(size not in (1, full) for size, full in last):
            raise InputError(f"{_NAME} takes initial of shape {shape[1:]}, not {tuple(initial.shape)}")
    return shape


def _dtype(a: Tensor, b: Tensor, initial: Tensor | None) -> torch.dtype:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return dtype if initial is None else torch.promote_types(dtype, initial.dtype)


def _kernel(a: Tensor, b: Tensor, initial: Tensor | None = None) -> tuple[Tensor]:
    shape, dtype, result = _shape(a, b, initial), wide(a, b, initial), _dtype(a, b, initial)
    a, b = a.to(dtype), b.to(dtype)
    state = a.new_zeros(shape[1:]) if initial is None else initial.to(dtype)
    states = []
    for decay, value in zip(a, b, strict=True):
        state = decay * state + value
        states.append(state.expand(shape[1:]))
    return (torch.stack(states).to(result),)


@torch.library.custom_op("mobilemix::linear_scan", mutates_args=())
def _operator(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    return _kernel(a, b, initial)[0]


@_operator.register_fake
def _(a: Tensor, b: Tensor, initial: Tensor | None = None) -> Tensor:
    return b.new_empty(_shape(a, b, initial), dtype=_dtype(a, b, initial))


register_gradient(_operator, _kernel)
