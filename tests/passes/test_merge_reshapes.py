import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten
from torch import Tensor, nn

from mobilemix.passes.merge_reshapes import MergeReshapes, _groups, _regroup


class Blocks(nn.Module):
    """Channels seen as groups, for a bias of each, between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.bias = nn.Parameter(torch.randn(2, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        blocks = torch.nn.functional.silu(self.a(x).unflatten(1, (2, 3)) + self.bias)
        return self.b((blocks * self.b(x).unflatten(1, (2, 3))).flatten(1, 2))


def test_elementwise_operators_move_out_from_between_reshapes() -> None:
    module, x = Blocks(), torch.randn(2, 6, 4, 4)
    program = rewritten(MergeReshapes(), module, x)
    # One is left on the bias, which is a constant.
    assert operators(program) == {"conv2d": 3, "add": 1, "silu": 1, "mul": 1, "reshape": 1}
    assert relative_error(program, module, x) < TOLERANCE


def test_chains_become_one() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = (x + 1).reshape(2, 12).unsqueeze(1).view(4, 6)
            return y.flatten(), y.reshape(2, 3, 4) * 2

    x = torch.randn(2, 3, 4)
    program = rewritten(MergeReshapes(), Module(), x)
    assert operators(program) == {"add": 1, "reshape": 1, "mul": 1}
    assert relative_error(program, Module(), x) < TOLERANCE


@given(st.lists(st.integers(1, 4), max_size=4), st.lists(st.integers(0, 3), max_size=3), st.data())
@settings(max_examples=60, deadline=None)
def test_a_regrouped_constant_broadcasts_alike(shape: list[int], merges: list[int], data: st.DataObject) -> None:
    after = list(shape)
    before = list(shape)
    for axis in merges:
        if axis + 1 < len(before):
            before[axis : axis + 2] = [before[axis] * before[axis + 1]]
    constant = torch.rand([size if data.draw(st.booleans()) else 1 for size in after])
    found = _regroup(constant.shape, after, before)
    if found is not None:
        assert torch.equal(constant.reshape(found).expand(before).reshape(after), constant.expand(after))
    groups = _groups(before, after)
    assert [axis for left, _ in groups for axis in left] == list(range(len(before)))
    assert [axis for _, right in groups for axis in right] == list(range(len(after)))


def test_a_constant_across_a_split_axis_keeps_the_reshape() -> None:
    assert _regroup([3, 1, 1], [2, 2, 3, 4, 4], [2, 6, 4, 4]) is None

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(2, 2, 3, 4, 4) + self.bias

    assert_untouched(MergeReshapes(), Module(), torch.randn(2, 6, 4, 4))


@pytest.mark.parametrize("module", [nn.Flatten(0), nn.Softmax(-1)])
def test_nothing_to_merge(module: nn.Module) -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(4, 6).softmax(-1).transpose(0, 1)

    assert_untouched(MergeReshapes(), Module(), torch.randn(2, 3, 4))
