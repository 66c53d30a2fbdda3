import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemix.models import flops, registry

# The papers' figures come from general counters, which charge batch norms that the device never runs: EfficientViM's
# repository calls fvcore (two a value), and CAS-ViT's figures are thop's (four a value; one for each input of an
# average pool). AFFNet's are printed to 0.1 G, which does not tell. Count what mobilemix counts, add what they charge.
NORM_CHARGE = {"AFFNet": 0, "CAS-ViT": 4, "EfficientViM": 2, "DualToken-ViT": 0}
POOL_CHARGE = {"AFFNet": 0, "CAS-ViT": 1, "EfficientViM": 0, "DualToken-ViT": 0}
# One unit of the last printed digit: some papers round, others cut.
PARAMETER_UNIT = {"AFFNet": 0.1e6, "CAS-ViT": 0.01e6, "EfficientViM": 0.1e6}
MAC_UNIT = {"AFFNet": 0.1e9, "CAS-ViT": 1e6, "EfficientViM": 1e6, "DualToken-ViT": 0.01e9}
# Without the charge, what mobilemix counts stays below the published figure by no more than this.
SHARE_OF_NORMS = {"CAS-ViT": 0.025, "EfficientViM": 0.012}

PUBLISHED = [spec for spec in registry.MODELS.values() if spec.published_top1 is not None]


def values_entering(model: nn.Module, kind: type[nn.Module], shape: tuple[int, ...]) -> int:
    sizes: list[int] = []
    for module in model.modules():
        if isinstance(module, kind):
            module.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].numel()))
    with torch.no_grad():
        model(torch.empty(shape, device="meta"))
    return sum(sizes)


@pytest.mark.parametrize("spec", PUBLISHED, ids=lambda spec: spec.name)
def test_parameters_and_multiply_adds_are_the_published_ones(spec: registry.ModelSpec) -> None:
    family, shape = spec.family.title, (1, 3, spec.input_size, spec.input_size)
    with torch.device("meta"):
        model = registry.build(spec)
    cost = flops.count(model, shape)
    if spec.published_parameters is not None:
        assert abs(cost.parameters - spec.published_parameters * 1e6) < PARAMETER_UNIT[family]
    assert spec.published_gmacs is not None
    published = spec.published_gmacs * 1e9
    charged = NORM_CHARGE[family] * values_entering(model, nn.BatchNorm2d, shape)
    charged += POOL_CHARGE[family] * values_entering(model, nn.AdaptiveAvgPool2d, shape)
    assert abs(cost.macs + charged - published) < MAC_UNIT[family]
    if family in SHARE_OF_NORMS:
        assert (1 - SHARE_OF_NORMS[family]) * published < cost.macs < published


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def attention(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=4), (2, 8, 16, 16), 2 * 12 * 8 * 8 * 2 * 9),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 6 * 4 * 25),
        (nn.Linear(7, 5), (2, 3, 7), 2 * 3 * 7 * 5),
        (Function(lambda x: x @ x.transpose(-1, -2)), (2, 3, 4, 5), 2 * 3 * 4 * 4 * 5),
        (Function(lambda x: torch.einsum("bij,bjk->bik", x, x)), (2, 4, 4), 2 * 4**3),
        (Function(attention), (1, 2, 10, 8), 2 * 2 * 10 * 10 * 8),
        (nn.Sequential(nn.BatchNorm2d(3), nn.SiLU(), nn.AvgPool2d(2)), (2, 3, 4, 4), 0),
        (Function(lambda x: torch.fft.irfft2(torch.fft.rfft2(x))), (1, 3, 8, 8), 0),
    ],
)
def test_multiply_adds_of_one_operation(model: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    cost = flops.count(model.eval(), shape)
    assert cost.macs == macs
    assert cost.parameters == sum(math.prod(parameter.shape) for parameter in model.parameters())


def test_counting_leaves_the_model_usable() -> None:
    model = registry.build(registry.find("affnet_et"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flops.count(model, (1, 3, 64, 64))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_tensors_made_in_the_forward_pass_are_no_obstacle() -> None:
    model = Function(lambda x: x @ torch.arange(12.0).reshape(3, 4))
    assert flops.count(model, (2, 3)).macs == 2 * 3 * 4
