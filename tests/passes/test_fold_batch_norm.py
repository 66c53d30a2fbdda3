import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten
from torch import Tensor, nn

from mobilemix.passes import fold_batch_norm
from mobilemix.passes.fold_batch_norm import FoldBatchNorm

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def _trained(norm: nn.Module) -> nn.Module:
    """Statistics as far from those of a new module as training makes them."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.1, 3)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


@given(
    rank=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.integers(1, 3),
    bias=st.booleans(),
    affine=st.booleans(),
    stride=st.integers(1, 2),
)
@settings(max_examples=20, deadline=None)
def test_norm_after_a_convolution(
    rank: int, transposed: bool, groups: int, bias: bool, affine: bool, stride: int
) -> None:
    kind = (TRANSPOSED if transposed else CONVOLUTIONS)[rank]
    conv = kind(groups * 2, groups * 4, 3, stride, padding=1, groups=groups, bias=bias)
    module = nn.Sequential(conv, _trained(NORMS[rank](groups * 4, affine=affine)))
    x = torch.randn(2, groups * 2, *[5] * rank)
    program = rewritten(FoldBatchNorm(), module, x)
    assert "batch_norm" not in operators(program)
    assert relative_error(program, module, x) < TOLERANCE


@given(rank=st.integers(1, 3), groups=st.integers(1, 3), kernel=st.integers(1, 3), bias=st.booleans())
@settings(max_examples=10, deadline=None)
def test_norm_before_a_convolution_without_padding(rank: int, groups: int, kernel: int, bias: bool) -> None:
    conv = CONVOLUTIONS[rank](groups * 2, groups * 4, kernel, groups=groups, bias=bias)
    module = nn.Sequential(_trained(NORMS[rank](groups * 2)), conv)
    x = torch.randn(2, groups * 2, *[5] * rank)
    program = rewritten(FoldBatchNorm(), module, x)
    assert "batch_norm" not in operators(program)
    assert relative_error(program, module, x) < TOLERANCE


@pytest.mark.parametrize("before", [False, True])
def test_norm_beside_a_linear_map(before: bool) -> None:
    linear, norm = nn.Linear(6, 6, bias=before), _trained(nn.BatchNorm1d(6))
    module = nn.Sequential(norm, linear) if before else nn.Sequential(linear, norm)
    x = torch.randn(4, 6)
    program = rewritten(FoldBatchNorm(), module, x)
    assert operators(program) == {"linear": 1}
    assert relative_error(program, module, x) < TOLERANCE


def test_padding_given_by_name() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), _trained(nn.BatchNorm2d(4)))
    x = torch.randn(1, 3, 5, 5)
    program = rewritten(FoldBatchNorm(), module, x)
    assert operators(program) == {"conv2d": 1}
    assert relative_error(program, module, x) < TOLERANCE


def test_weights_keep_their_names() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), _trained(nn.BatchNorm2d(4)))
    program = rewritten(FoldBatchNorm(), module, torch.randn(1, 3, 4, 4))
    assert set(program.state_dict) == {"0.weight", "0.bias"}


def test_decomposed_norm_is_folded_too() -> None:
    """An operator that writes into shared memory makes torch.export's own decomposition necessary."""

    class Module(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x) + 1
            x.flatten().mul_(2)
            return x

    module = Module(nn.Conv2d(3, 4, 1), _trained(nn.BatchNorm2d(4)))
    x = torch.randn(1, 3, 4, 4)
    program = rewritten(FoldBatchNorm(), module, x)
    assert not [name for name in operators(program) if "batch_norm" in name]
    assert relative_error(program, module, x) < TOLERANCE


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), _trained(nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(_Shared(), id="shared value"),
        pytest.param(nn.Sequential(_trained(nn.BatchNorm2d(3)), nn.Conv2d(3, 3, 3, padding=1)), id="padded border"),
        pytest.param(nn.Sequential(_trained(nn.BatchNorm2d(3)), nn.ReLU(), nn.Conv2d(3, 3, 1)), id="activation"),
        pytest.param(nn.Conv2d(3, 3, 1), id="no norm"),
    ],
)
def test_what_cannot_be_folded_stays(module: nn.Module) -> None:
    assert_untouched(FoldBatchNorm(), module, torch.randn(1, 3, 5, 5))


def test_a_wrong_shift_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold_batch_norm._batch_norm

    def wrong(*args: object) -> object:
        norm = right(*args)  # type: ignore[arg-type]
        return norm and fold_batch_norm._BatchNorm(norm.input, norm.output, norm.scale, norm.shift * 1.001)

    monkeypatch.setattr(fold_batch_norm, "_batch_norm", wrong)
    module = nn.Sequential(nn.Conv2d(3, 4, 1), _trained(nn.BatchNorm2d(4)))
    x = torch.randn(1, 3, 4, 4)
    assert relative_error(rewritten(FoldBatchNorm(), module, x), module, x) > 10 * TOLERANCE


def test_statistics_of_the_batch_are_not_folded() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    program = torch.export.export(module, (torch.randn(2, 3, 5, 5),))
    assert not FoldBatchNorm()(program).modified
