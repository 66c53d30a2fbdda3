import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten, trained
from torch import Tensor, nn

from mobilemix.passes import fold_affine
from mobilemix.passes.fold_affine import FoldAffine

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Affine(nn.Module):
    """A scale and a shift of one number for each entry of an axis, or for all."""

    def __init__(self, *shape: int, scale: bool = True, shift: bool = True):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(shape)) if scale else None
        self.shift = nn.Parameter(torch.randn(shape)) if shift else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.scale is None else x * self.scale
        return x if self.shift is None else self.shift - x


@given(rank=st.integers(1, 3), groups=st.integers(1, 3), kernel=st.integers(1, 3), bias=st.booleans())
@settings(max_examples=10, deadline=None)
def test_batch_norm_before_a_convolution(rank: int, groups: int, kernel: int, bias: bool) -> None:
    conv = CONVOLUTIONS[rank](groups * 2, groups * 4, kernel, groups=groups, bias=bias)
    module = nn.Sequential(trained(NORMS[rank](groups * 2)), conv)
    x = torch.randn(2, groups * 2, *[5] * rank)
    program = rewritten(FoldAffine(), module, x)
    assert operators(program) == {f"conv{rank}d": 1}
    assert relative_error(program, module, x) < TOLERANCE


@given(groups=st.integers(1, 3), padding=st.integers(0, 2), stride=st.integers(1, 2), vector=st.booleans())
@settings(max_examples=10, deadline=None)
def test_scales_go_through_borders(groups: int, padding: int, stride: int, vector: bool) -> None:
    shape = (groups * 2, 1, 1) if vector else ()
    conv = nn.Conv2d(groups * 2, groups * 3, 3, stride, padding, groups=groups)
    module, x = nn.Sequential(Affine(*shape, shift=False), conv), torch.randn(2, groups * 2, 6, 7)
    program = rewritten(FoldAffine(), module, x)
    assert operators(program) == {"conv2d": 1}
    assert relative_error(program, module, x) < TOLERANCE


class Head(nn.Module):
    """Two features, each with an affine map, pooled in ways of their own, side by side into one linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.affine, self.fc = trained(nn.BatchNorm2d(6)), Affine(4, 1), nn.Linear(10, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(self.norm(x), 1).flatten(1)
        tokens = self.affine(y).transpose(1, 2).mean(1)
        return self.fc(torch.cat((pooled, tokens), -1))


def test_means_and_concatenations_are_passed() -> None:
    module, inputs = Head(), (torch.randn(2, 6, 4, 5), torch.randn(2, 4, 7))
    program = rewritten(FoldAffine(), module, *inputs)
    assert not {"batch_norm", "mul", "sub"} & set(operators(program))
    assert set(program.state_dict) == {"fc.weight", "fc.bias"}
    assert relative_error(program, module, *inputs) < TOLERANCE


class Shared(nn.Module):
    """A norm with several readers."""

    def __init__(self) -> None:
        super().__init__()
        self.affine, self.a, self.b = Affine(1, 6, 1, 1), nn.Conv2d(6, 4, 2, 2), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.affine(x)
        return self.a(y), self.b(y.mean((2, 3), keepdim=True))


def test_all_users_take_it() -> None:
    module, x = Shared(), torch.randn(2, 6, 4, 4)
    program = rewritten(FoldAffine(), module, x)
    assert operators(program) == {"conv2d": 2, "mean": 1}
    assert relative_error(program, module, x) < TOLERANCE


@pytest.mark.parametrize("groups", [1, 3])
def test_a_group_norm_keeps_its_statistics(groups: int) -> None:
    module = nn.Sequential(trained(nn.GroupNorm(groups, 6)), nn.Conv2d(6, 4, 1))
    x = torch.randn(2, 6, 5, 5)
    program = rewritten(FoldAffine(), module, x)
    assert operators(program) == {"group_norm": 1, "conv2d": 1}
    assert set(program.state_dict) == {"1.weight", "1.bias"}
    assert relative_error(program, module, x) < TOLERANCE


class Skip(Shared):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.affine(x)
        return self.b(y), y


class Tied(Shared):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.b(self.affine(x)), self.b(x)


class Positions(nn.Module):
    """Scales of rows, which no channel of the linear map is."""

    def __init__(self) -> None:
        super().__init__()
        self.affine, self.fc = Affine(4, 1, shift=False), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.affine(x))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        pytest.param(nn.Sequential(Affine(6, 1, 1), nn.Conv2d(6, 3, 3, padding=1)), (1, 6, 5, 5), id="padded border"),
        pytest.param(nn.Sequential(Affine(6, 1, 1), nn.ReLU(), nn.Conv2d(6, 3, 1)), (1, 6, 5, 5), id="activation"),
        pytest.param(nn.Sequential(Affine(6, 5, 5), nn.Conv2d(6, 3, 1)), (1, 6, 5, 5), id="positions of a map"),
        pytest.param(Positions(), (2, 4, 6), id="positions"),
        pytest.param(Skip(), (1, 6, 4, 4), id="another user"),
        pytest.param(Tied(), (1, 6, 4, 4), id="tied weights"),
        pytest.param(Affine(6, 1, 1), (1, 6, 5, 5), id="output"),
        pytest.param(nn.Sequential(Affine(6, 1, 1), nn.AvgPool2d(2, padding=1), nn.Conv2d(6, 3, 1)), (1, 6, 4, 4)),
    ],
)
def test_what_cannot_be_folded_stays(module: nn.Module, shape: tuple[int, ...]) -> None:
    assert_untouched(FoldAffine(), module, torch.randn(shape))


def test_weights_stay_within_half_precision() -> None:
    module = nn.Sequential(Affine(6, 1, 1, shift=False), nn.Conv2d(6, 3, 1))
    nn.init.constant_(module[0].scale, 1e6)
    assert_untouched(FoldAffine(), module, torch.randn(1, 6, 4, 4))


def test_a_wrong_shift_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold_affine.input_scaled
    monkeypatch.setattr(fold_affine, "input_scaled", lambda e, n, scale, shift: right(e, n, scale, shift * 1.001))
    module, x = Shared(), torch.randn(2, 6, 4, 4)
    assert relative_error(rewritten(FoldAffine(), module, x), module, x) > 10 * TOLERANCE
