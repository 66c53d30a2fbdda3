import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten
from torch import Tensor, nn

from mobilemix.capture import capture
from mobilemix.passes import merge_linear
from mobilemix.passes.fold_constants import FoldConstants
from mobilemix.passes.merge_linear import MergeLinear


class Averaged(nn.Module):
    """The two heads of a model trained by distillation."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.head, self.distilled = nn.Linear(8, 5, bias=bias), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return (self.head(x) + self.distilled(x)) / 2


@pytest.mark.parametrize("bias", [False, True])
def test_averaged_heads_become_one(bias: bool) -> None:
    module, x = Averaged(bias), torch.randn(3, 8)
    program = rewritten(MergeLinear(), module, x)
    assert operators(program) == {"linear": 1}
    assert set(program.state_dict) == {"head.weight", "head.bias"}
    assert relative_error(program, module, x) < TOLERANCE


class Weighted(nn.Module):
    """Heads of several features, each with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(width, 20) for width in (8, 12)])
        self.register_buffer("weight", torch.tensor([0.25]))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.weight * self.heads[0](x) - 3 * self.heads[1](y) - self.heads[0](x)


def test_heads_of_several_features_become_one() -> None:
    module, inputs = Weighted(), (torch.randn(2, 8), torch.randn(2, 12))
    program = rewritten(MergeLinear(), module, *inputs)
    assert operators(program) == {"cat": 1, "linear": 1}
    assert relative_error(program, module, *inputs) < TOLERANCE


class ComplexProduct(nn.Module):
    """Block-diagonal complex weights on real and imaginary part, as convolutions."""

    def __init__(self, groups: int, kernel: int, rank: int):
        super().__init__()
        self.conv = (torch.nn.functional.conv1d, torch.nn.functional.conv2d)[rank - 1]
        self.groups = groups
        shape = (groups * 3, 2, *[kernel] * rank)
        self.re, self.im = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(2, groups * 3, *[1] * rank))

    def forward(self, r: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        def mix(x: Tensor, weight: Tensor) -> Tensor:
            return self.conv(x, weight, groups=self.groups)

        return (
            mix(r, self.re) - mix(i, self.im) + self.bias[0],
            mix(i, self.re) + mix(r, self.im) + self.bias[1],
        )


@given(groups=st.integers(1, 3), kernel=st.integers(1, 3), rank=st.integers(1, 2))
@settings(max_examples=8, deadline=None)
def test_a_complex_product_becomes_one_convolution(groups: int, kernel: int, rank: int) -> None:
    module = ComplexProduct(groups, kernel, rank)
    inputs = tuple(torch.randn(2, groups * 2, *[4] * rank) for _ in range(2))
    program = MergeLinear()(FoldConstants()(capture(module, inputs)).program).program
    found = operators(program)
    assert found["conv1d"] + found["conv2d"] == 1
    assert found["add"] + found["sub"] == 0
    assert relative_error(program, module, *inputs) < TOLERANCE


class Scaled(nn.Module):
    """A convolution with a layer scale and an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.scale, self.shift = nn.Parameter(torch.randn(4, 1, 1)), nn.Parameter(torch.randn(1, 4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.shift - self.scale * self.conv(x) / 3


def test_scales_and_offsets_of_channels_go_into_the_weights() -> None:
    module, x = Scaled(), torch.randn(2, 3, 5, 5)
    program = rewritten(MergeLinear(), module, x)
    assert operators(program) == {"conv2d": 1}
    assert relative_error(program, module, x) < TOLERANCE


class Shared(Averaged):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.head(x)
        return a + self.distilled(x), a


class Apart(nn.Module):
    """Convolutions whose sum is not theirs to take: other strides, or nothing in common with another sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1, stride=2), nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.c, self.d = nn.Conv2d(3, 4, 1), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.a(x) + self.b(x), self.c(x) + self.d(y)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.offset = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(1, 4, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.offset


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        (Shared(), [(2, 8)]),
        (Apart(), [(1, 3, 5, 5), (1, 5, 5, 5)]),
        (Positions(), [(1, 3, 5, 5)]),
        (nn.Linear(3, 4), [(2, 3)]),
    ],
    ids=lambda item: type(item).__name__,
)
def test_other_sums_stay(module: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    assert_untouched(MergeLinear(), module, *map(torch.randn, shapes))


def test_tokens_are_not_concatenated_for_a_small_product() -> None:
    assert_untouched(MergeLinear(), Weighted(), torch.randn(2, 50, 8), torch.randn(2, 50, 12))


def test_a_wrong_sign_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = merge_linear._Map.plus
    monkeypatch.setattr(merge_linear._Map, "plus", lambda self, other, factor: right(self, other, -factor))
    x = torch.randn(3, 8)
    assert relative_error(rewritten(MergeLinear(), module := Averaged(), x), module, x) > 10 * TOLERANCE
