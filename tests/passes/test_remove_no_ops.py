import torch
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten
from torch import Tensor, nn

from mobilemix.passes.remove_no_ops import RemoveNoOps


class Redundant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x * 2).transpose(1, 2).contiguous().clone().detach().to(torch.float32)
        return x.view(x.shape).reshape(2, -1).expand(2, 12) + 1


def test_no_ops_are_dropped() -> None:
    x = torch.randn(2, 3, 4)
    program = rewritten(RemoveNoOps(), Redundant(), x)
    assert operators(program) == {"mul": 1, "transpose": 1, "reshape": 1, "add": 1}
    assert relative_error(program, Redundant(), x) < TOLERANCE


def test_a_view_of_what_was_made_contiguous_becomes_a_reshape() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.transpose(1, 2).contiguous().view(2, -1)

    x = torch.randn(2, 3, 4)
    program = rewritten(RemoveNoOps(), Module(), x)
    assert operators(program) == {"transpose": 1, "reshape": 1}
    assert torch.equal(program.module()(x), Module()(x))


def test_what_does_something_stays() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x.sum(0), x.reshape(-1), x[:1].expand(3, 3), 0 - x, x + 1, x * 0, x.argmax(1) * 1.0

    assert_untouched(RemoveNoOps(), Module(), torch.randn(2, 3))


def test_neutral_numbers_are_dropped() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ((x.exp() + 0) * 1.0 - 0.0) / 1

    x = torch.randn(2, 3)
    program = rewritten(RemoveNoOps(), Module(), x)
    assert operators(program) == {"exp": 1}
    assert torch.equal(program.module()(x), x.exp())


def test_dead_code_and_checks_are_dropped() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.exp()
            return x.to(torch.float16) * 2

    assert operators(rewritten(RemoveNoOps(), Module(), torch.randn(2, 3))) == {"to": 1, "mul": 1}


def test_an_output_does_not_become_an_input() -> None:
    assert_untouched(RemoveNoOps(), nn.Dropout(), torch.randn(2, 3))
