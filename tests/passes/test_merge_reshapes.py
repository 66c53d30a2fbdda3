import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten
from torch import Tensor, nn

from mobilemix.passes.axes import groups_of_axes
from mobilemix.passes.merge_reshapes import MergeReshapes, _regroup


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
    groups = groups_of_axes(before, after)
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


class Tokens(nn.Module):
    """A norm over channels and a pointwise convolution of the positions of a map, laid out in one row."""

    def __init__(self, channels: int, groups: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, channels, 1))
        self.conv = nn.Conv1d(channels, 2 * channels, 1, groups=groups, bias=bias)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        row = x.flatten(2)
        centred = row - row.mean(1, keepdim=True)
        normed = centred * (centred.square().mean(1, keepdim=True) + 1e-5).rsqrt() * self.weight
        return self.depthwise(self.conv(normed).unflatten(-1, x.shape[2:])), normed


@given(
    channels=st.integers(2, 4), groups=st.integers(1, 2), bias=st.booleans(), size=st.tuples(*[st.integers(1, 4)] * 2)
)
@settings(max_examples=10, deadline=None)
def test_norms_and_pointwise_convolutions_stay_on_the_map(
    channels: int, groups: int, bias: bool, size: tuple[int, int]
) -> None:
    module, x = Tokens(groups * channels, groups, bias), torch.randn(2, groups * channels, *size)
    program = rewritten(MergeReshapes(), module, x)
    found = operators(program)
    assert (found["conv1d"], found["conv2d"]) == (0, 2)
    # One is left for the output, and one on the weight, which is a constant.
    assert found["reshape"] + found["flatten"] + found["unflatten"] <= 2
    assert relative_error(program, module, x) < TOLERANCE


class OtherRows(nn.Module):
    """A kernel over neighbours in the row, a stride along it, and a mean over it."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.long = nn.Conv1d(3, 3, 2), nn.Conv1d(3, 3, 1, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        row = x.flatten(2)
        return self.wide(row), self.long(row), row.mean(-1, keepdim=True)


def test_what_depends_on_the_row_stays_in_it() -> None:
    module, x = OtherRows(), torch.randn(2, 3, 4, 4)
    program = rewritten(MergeReshapes(), module, x)
    assert operators(program) == {"reshape": 1, "conv1d": 2, "mean": 1}
    assert relative_error(program, module, x) < TOLERANCE
