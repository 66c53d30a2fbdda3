import pytest
import torch
from passes_checks import assert_untouched, operators, rewritten
from torch import Tensor, nn
from torch.nn import functional as F

from mobilemix.passes.unstack import Unstack


class Case(nn.Module):
    def __init__(self, function: object):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor) -> object:
        return self.function(x, y)  # type: ignore[operator]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_parts_are_taken_before_they_are_stacked(axis: int) -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        both = F.softshrink(torch.stack((x, y), axis), 0.1) * 2
        return both.select(axis, -1), both.select(axis, 0), both.unbind(axis)[1]

    inputs = (torch.randn(2, 3), torch.randn(2, 3))
    program = rewritten(Unstack(), Case(function), *inputs)
    assert set(operators(program)) == {"softshrink", "mul"}
    assert all(map(torch.equal, program.module()(*inputs), function(*inputs)))


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x, y: torch.stack((x, y), 0).select(1, 0), id="another axis"),
        pytest.param(lambda x, y: torch.stack((x, y), 0).softmax(0)[0], id="not elementwise"),
        pytest.param(lambda x, y: (torch.stack((x, y), 0) * x)[0], id="another operand"),
        pytest.param(lambda x, y: torch.cat((x, y), 0)[0], id="no stack"),
    ],
)
def test_other_selections_stay(function: object) -> None:
    assert_untouched(Unstack(), Case(function), torch.randn(2, 3), torch.randn(2, 3))
