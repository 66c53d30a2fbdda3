import pytest
import torch
from passes_checks import TOLERANCE, operators, relative_error
from torch import Tensor, nn

from mobilemix.passes.make_functional import MakeFunctional


class Writes(nn.Module):
    """An assignment to a slice, an operator in place and a batch norm; `seen`: through another view, too."""

    def __init__(self, seen: bool):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.seen = seen

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        view = y[:, 1:3]
        y[:, :2] = self.norm(x)[:, 2:]
        y += 1
        return y + (view.sum() if self.seen else 0)


@pytest.mark.parametrize("seen", [False, True])
def test_what_is_written_is_returned(seen: bool) -> None:
    module, x = Writes(seen).eval(), torch.randn(3, 4)
    program = torch.export.export(module, (x,))
    before = str(program.graph)
    result = MakeFunctional()(program)
    assert result.modified
    assert str(program.graph) == before, "a pass must not change the program that it is given"
    assert not MakeFunctional()(result.program).modified
    assert not [name for name in operators(result.program) if name.endswith("_")]
    assert ("batch_norm" in operators(result.program)) is not seen, "whole where nothing else reads what is written"
    assert relative_error(result.program, module, x) < TOLERANCE


def test_a_functional_program_is_left_as_it_is() -> None:
    program = torch.export.export(nn.Linear(3, 4), (torch.randn(2, 3),))
    assert MakeFunctional()(program).program is program
