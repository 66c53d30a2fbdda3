import pytest
import torch
from passes_checks import assert_untouched, operators, rewritten
from torch import Tensor, nn
from torch.nn import functional as F

from mobilemix.passes.merge_slices import MergeSlices


class Alike(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((F.softshrink(x[:, :3], 0.2), F.softshrink(x[:, 3:], 0.2)), 1) * 2


def test_slices_that_are_treated_alike_are_not_cut() -> None:
    x = torch.randn(2, 5, 4)
    program = rewritten(MergeSlices(), Alike(), x)
    assert operators(program) == {"softshrink": 1, "mul": 1}
    assert torch.equal(program.module()(x), Alike()(x))


class Case(nn.Module):
    def __init__(self, function: object):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # type: ignore[operator]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: torch.cat((F.relu(x[:, :3]), F.silu(x[:, 3:])), 1), id="other operators"),
        pytest.param(lambda x: torch.cat((F.softshrink(x[:, :3], 0.1), F.softshrink(x[:, 3:], 0.2)), 1), id="options"),
        pytest.param(lambda x: torch.cat((F.relu(x[:, :2]), F.relu(x[:, 3:])), 1), id="a gap"),
        pytest.param(lambda x: torch.cat((x[:, 3:], x[:, :3]), 1), id="another order"),
        pytest.param(lambda x: torch.cat((x[:, :3], x[:, 3:].repeat(1, 1, 1)), 1), id="something else"),
        pytest.param(lambda x: torch.cat((x[:, ::2], x[:, 1::2]), 1), id="steps"),
        pytest.param(lambda x: torch.cat((x[:, :3], x[:, 2:]), 1), id="overlap"),
    ],
)
def test_other_slices_stay(function: object) -> None:
    assert_untouched(MergeSlices(), Case(function), torch.randn(2, 5, 4))
