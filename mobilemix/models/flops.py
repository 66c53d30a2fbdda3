"""What a model costs, counted the way the papers do, without running it."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Cost:
    """What one forward pass needs.

    Attributes:
        parameters: number of parameters; buffers are left out.
        macs: multiply-adds, each counted once: the papers' "FLOPs".
    """

    parameters: int
    macs: int


def count(model: nn.Module, shape: tuple[int, ...]) -> Cost:
    """The cost of `model` for one float32 input of `shape`, batch included.

    Multiply-adds are those of convolutions, linear layers, matrix products (einsum included) and attention. Norms,
    activations, pooling and elementwise arithmetic count nothing: batch norms fold into convolutions before they
    reach a device, and the rest are no multiply-adds. Nor do FFTs: the counters behind the published figures leave
    them out, and what they cost depends on the target's lowering. Only shapes are computed, never values.
    """
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    device = next((weight.device for weight in weights.values()), None)
    with FakeTensorMode(allow_non_fake_inputs=True), counting() as counter:
        torch.func.functional_call(model, weights, torch.empty(shape, device=device))
    return Cost(sum(weight.numel() for weight in weights.values()), counter.macs)


class Counter(FlopCounterMode):
    """Counts the multiply-adds of what torch computes, on fake tensors too."""

    def __init__(self) -> None:
        """Count in silence."""
        super().__init__(display=False)

    @property
    def macs(self) -> int:
        """Multiply-adds so far: torch counts two operations for each."""
        return self.get_total_flops() // 2


@contextlib.contextmanager
def counting() -> Iterator[Counter]:
    """Count what is computed inside; attention as its matrix products, which the counter knows on every device."""
    with sdpa_kernel(SDPBackend.MATH), Counter() as counter:
        yield counter


def convolution(output: Sequence[int], weight: Sequence[int]) -> int:
    """Multiply-adds of a convolution; weight (K, C / groups, ...)."""
    return math.prod(output) * math.prod(weight[1:])


def transposed_convolution(input: Sequence[int], weight: Sequence[int]) -> int:  # noqa: A002, the field's own name
    """Multiply-adds of a transposed convolution; weight (C, K / groups, ...)."""
    return math.prod(input) * math.prod(weight[1:])


def einstein_sum(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    """Multiply-adds of an Einstein sum of two tensors without an ellipsis; none of one tensor."""
    labels = equation.replace(" ", "").split("->")[0].split(",")
    sizes = {
        label: size for term, shape in zip(labels, shapes, strict=True) for label, size in zip(term, shape, strict=True)
    }
    return math.prod(sizes.values()) if len(shapes) > 1 else 0
