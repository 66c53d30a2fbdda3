"""What a model costs, counted the way the papers do, without running it."""

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
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        sdpa_kernel(SDPBackend.MATH),  # matrix products, which the counter knows on every device
        FlopCounterMode(display=False) as counter,
    ):
        torch.func.functional_call(model, weights, torch.empty(shape, device=device))
    return Cost(sum(weight.numel() for weight in weights.values()), counter.get_total_flops() // 2)
