import pytest
import torch
from torch import nn
from torch.export import ExportedProgram

from mobilemix.capture import capture
from mobilemix.passes.base import Pass, PassError, PassResult, arguments, source

X = torch.randn(1, 3)


class Swap(Pass):
    name = "swap"

    def __init__(self, other: ExportedProgram, modified: bool):
        self.other, self.modified = other, modified

    def rewrite(self, program: ExportedProgram) -> PassResult:
        return PassResult(self.other, self.modified)


def test_another_program_has_to_count_as_modified() -> None:
    program, same = (capture(nn.Linear(3, 2), (X,)) for _ in range(2))
    assert Swap(same, modified=True)(program).program is same
    with pytest.raises(PassError, match="changed nothing"):
        Swap(same, modified=False)(program)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Linear(3, 4), r"\('output', 0, .*\(1, 2\).*became.*\(1, 4\)"),
        (nn.ReLU(), r"'input', 'input', .* became"),
        (nn.Bilinear(3, 3, 2), r"became|number of inputs"),
    ],
)
def test_a_changed_interface_is_refused(other: nn.Module, message: str) -> None:
    inputs = (X, X) if isinstance(other, nn.Bilinear) else (X[:, :1],) if isinstance(other, nn.ReLU) else (X,)
    with pytest.raises(PassError, match=message):
        Swap(capture(other, inputs), modified=True)(capture(nn.Linear(3, 2), (X,)))


def test_a_pass_may_declare_what_becomes_of_inputs_and_outputs() -> None:
    class Widen(Swap):
        def keeps(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
            return (shape, dtype) if shape == (1, 3) else ((*shape[:-1], 4), dtype)

    narrow, wide, wider = (capture(nn.Linear(3, size), (X,)) for size in (2, 4, 5))
    assert Widen(wide, modified=True)(narrow).program is wide
    with pytest.raises(PassError, match=r"\(1, 2\).*became.*\(1, 5\)"):
        Widen(wider, modified=True)(narrow)


def test_arguments_are_named_and_complete() -> None:
    program = capture(nn.Conv2d(3, 4, 3, padding=1), (torch.randn(1, 3, 5, 5),))
    (conv,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    found = arguments(conv)
    assert list(found)[:3] != []
    assert (list(found["stride"]), list(found["padding"]), found["groups"]) == ([1, 1], [1, 1], 1)
    assert found["input"].name == "input"


def test_source_is_the_users_line() -> None:
    class Module(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stft(x, 4, return_complex=True).abs()

    program = capture(Module(), (torch.randn(16),))
    (node,) = [node for node in program.graph.nodes if "stft" in node.name]
    assert "test_base.py:" in source(node)
    assert "(return torch.stft(x, 4, return_complex=True).abs())" in source(node)
    node.meta.pop("stack_trace")
    assert source(node) == f"node {node.name}"
