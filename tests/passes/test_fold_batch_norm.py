import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten, trained
from torch import Tensor, nn

from mobilemix.passes import fold_batch_norm
from mobilemix.passes.fold_batch_norm import FoldBatchNorm

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


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
    module = nn.Sequential(conv, trained(NORMS[rank](groups * 4, affine=affine)))
    x = torch.randn(2, groups * 2, *[5] * rank)
    program = rewritten(FoldBatchNorm(), module, x)
    assert "batch_norm" not in operators(program)
    assert relative_error(program, module, x) < TOLERANCE


@pytest.mark.parametrize("bias", [False, True])
def test_norm_after_a_linear_map(bias: bool) -> None:
    module, x = nn.Sequential(nn.Linear(6, 6, bias=bias), trained(nn.BatchNorm1d(6))), torch.randn(4, 6)
    program = rewritten(FoldBatchNorm(), module, x)
    assert operators(program) == {"linear": 1}
    assert relative_error(program, module, x) < TOLERANCE


def test_padding_given_by_name() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), trained(nn.BatchNorm2d(4)))
    x = torch.randn(1, 3, 5, 5)
    program = rewritten(FoldBatchNorm(), module, x)
    assert operators(program) == {"conv2d": 1}
    assert relative_error(program, module, x) < TOLERANCE


def test_weights_keep_their_names() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), trained(nn.BatchNorm2d(4)))
    program = rewritten(FoldBatchNorm(), module, torch.randn(1, 3, 4, 4))
    assert set(program.state_dict) == {"0.weight", "0.bias"}


def test_decomposed_norm_is_folded_too() -> None:
    """An operator that writes into shared memory makes torch.export's own decomposition necessary."""

    class Module(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x) + 1
            x.flatten().mul_(2)
            return x

    module = Module(nn.Conv2d(3, 4, 1), trained(nn.BatchNorm2d(4)))
    x = torch.randn(1, 3, 4, 4)
    program = rewritten(FoldBatchNorm(), module, x)
    assert not [name for name in operators(program) if "batch_norm" in name]
    assert relative_error(program, module, x) < TOLERANCE


class _Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), trained(nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(_Shared(), id="shared value"),
        pytest.param(nn.Sequential(trained(nn.BatchNorm2d(3)), nn.Conv2d(3, 3, 1)), id="norm first"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), trained(nn.BatchNorm2d(3))), id="activation"),
        pytest.param(nn.Conv2d(3, 3, 1), id="no norm"),
    ],
)
def test_what_cannot_be_folded_stays(module: nn.Module) -> None:
    assert_untouched(FoldBatchNorm(), module, torch.randn(1, 3, 5, 5))


def test_a_wrong_shift_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold_batch_norm.output_scaled
    monkeypatch.setattr(fold_batch_norm, "output_scaled", lambda e, n, scale, shift: right(e, n, scale, shift * 1.001))
    module = nn.Sequential(nn.Conv2d(3, 4, 1), trained(nn.BatchNorm2d(4)))
    x = torch.randn(1, 3, 4, 4)
    assert relative_error(rewritten(FoldBatchNorm(), module, x), module, x) > 10 * TOLERANCE


def test_statistics_of_the_batch_are_not_folded() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    program = torch.export.export(module, (torch.randn(2, 3, 5, 5),))
    assert not FoldBatchNorm()(program).modified
