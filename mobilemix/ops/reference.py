"""What the reference kernels share: checks of arguments, the dtype to compute in, gradients."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mobilemix.errors import InputError

Kernel = Callable[..., tuple[Tensor, ...]]


def check_real(operator: str, tensors: Mapping[str, Tensor | None]) -> None:
    """Refuse complex and integer tensors."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            kind = "complex" if tensor.is_complex() else str(tensor.dtype).removeprefix("torch.")
            raise InputError(f"{operator} takes real floating-point tensors, {name} is {kind}; use a real {name}")


def check_shape(operator: str, name: str, tensor: Tensor | None, *valid: tuple[int, ...]) -> None:
    """Refuse a tensor of none of the valid shapes; None is an argument that was not given."""
    if tensor is not None and tuple(tensor.shape) not in valid:
        wanted = " or ".join(map(str, valid))
        raise InputError(f"{operator} takes {name} of shape {wanted}, not {tuple(tensor.shape)}")


def wide(*tensors: Tensor | None) -> torch.dtype:
    """The dtype to compute in: that of the widest tensor, at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def register_gradient(operator: Any, kernel: Kernel) -> None:
    """Differentiate `operator` through `kernel`, which computes the same in differentiable steps, run once more.

    Only the inputs are kept from the forward pass; second derivatives are not defined.
    """

    def setup(ctx: Any, inputs: Sequence[Any], output: object) -> None:  # noqa: ARG001, the registration's signature
        ctx.others = [None if isinstance(item, Tensor) else item for item in inputs]
        ctx.positions = [position for position, item in enumerate(inputs) if isinstance(item, Tensor)]
        ctx.save_for_backward(*(inputs[position] for position in ctx.positions))

    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs = list(ctx.others)
        for position, tensor in zip(ctx.positions, ctx.saved_tensors, strict=True):
            inputs[position] = tensor.detach().requires_grad_(ctx.needs_input_grad[position])
        wanted = [position for position in ctx.positions if ctx.needs_input_grad[position]]
        with torch.enable_grad():
            outputs = kernel(*inputs)
        found = torch.autograd.grad(outputs, [inputs[position] for position in wanted], gradients, allow_unused=True)
        by_position = dict(zip(wanted, found, strict=True))
        return tuple(by_position.get(position) for position in range(len(inputs)))

    operator.register_autograd(backward, setup_context=setup)
