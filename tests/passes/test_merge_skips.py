import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten
from torch import Tensor, nn

from mobilemix.passes import merge_skips
from mobilemix.passes.merge_linear import MergeLinear
from mobilemix.passes.merge_skips import MergeSkips

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Skip(nn.Module):
    """scale · x + shift + conv(x)."""

    def __init__(self, conv: nn.Module, scale: Tensor | None = None, shift: float = 0.0, swap: bool = False):
        super().__init__()
        self.conv, self.shift, self.swap = conv, shift, swap
        self.scale = None if scale is None else nn.Parameter(scale)

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.scale is None else self.scale * x
        skip = skip + self.shift if self.shift else skip
        return self.conv(x) + skip if self.swap else skip + self.conv(x)


@given(
    rank=st.integers(1, 3),
    half=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    scaled=st.booleans(),
    swap=st.booleans(),
)
@settings(max_examples=15, deadline=None)
def test_a_skip_becomes_a_tap(rank: int, half: int, dilation: int, bias: bool, scaled: bool, swap: bool) -> None:
    kernel = 2 * half + 1
    conv = CONVOLUTIONS[rank](4, 4, kernel, padding=half * dilation, dilation=dilation, groups=4, bias=bias)
    module = Skip(conv, torch.randn(4, *[1] * rank) if scaled else None, swap=swap)
    x = torch.randn(2, 4, *[6] * rank)
    program = rewritten(MergeSkips(), module, x)
    assert operators(program) == {f"conv{rank}d": 1}
    assert relative_error(program, module, x) < TOLERANCE


def test_kernels_need_not_be_square() -> None:
    module, x = Skip(nn.Conv2d(4, 4, (5, 3), padding="same", groups=4)), torch.randn(1, 4, 7, 6)
    program = rewritten(MergeSkips(), module, x)
    assert operators(program) == {"conv2d": 1}
    assert relative_error(program, module, x) < TOLERANCE


def test_one_after_another() -> None:
    convs = [nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(3)]
    module, x = nn.Sequential(*(Skip(conv) for conv in convs)), torch.randn(1, 4, 5, 5)
    program = rewritten(MergeSkips(), module, x)
    assert operators(program) == {"conv2d": 3}
    assert relative_error(program, module, x) < TOLERANCE


class Blend(nn.Module):
    """(1 − a) · x + a · conv(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.register_buffer("gate", torch.rand(4, 1, 1))
        self.register_buffer("rest", 1 - self.gate)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest * x + self.gate * self.conv(x)


def test_a_gated_blend_becomes_one_convolution() -> None:
    class Both(MergeSkips):
        def rewrite(self, program):  # type: ignore[no-untyped-def]
            return super().rewrite(MergeLinear()(program).program)

    module, x = Blend(), torch.randn(1, 4, 5, 5)
    program = Both()(torch.export.export(module, (x,)).run_decompositions({})).program
    assert operators(program) == {"conv2d": 1}
    assert relative_error(program, module, x) < TOLERANCE


class Twice(nn.Module):
    """The result of the convolution is used again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return x + y, y


class Other(Twice):
    """The skip comes from elsewhere."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.relu() + self.conv(x)


@pytest.mark.parametrize(
    "module",
    [
        pytest.param(Skip(nn.Conv2d(4, 4, 1)), id="not depthwise"),
        pytest.param(Skip(nn.Conv2d(4, 4, 4, padding="same", groups=4)), id="even kernel"),
        pytest.param(Skip(nn.Conv2d(4, 4, 3, padding=1, groups=4), torch.randn(4, 5, 5)), id="scale of positions"),
        pytest.param(Twice(), id="another user"),
        pytest.param(Other(), id="another skip"),
    ],
)
def test_other_sums_stay(module: nn.Module) -> None:
    assert_untouched(MergeSkips(), module, torch.randn(1, 4, 5, 5))


def test_a_tap_beside_the_middle_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = merge_skips.parameters
    monkeypatch.setattr(
        merge_skips, "parameters", lambda edit, conv: (right(edit, conv)[0].roll(1, -1), right(edit, conv)[1])
    )
    module, x = Skip(nn.Conv2d(4, 4, 3, padding=1, groups=4)), torch.randn(1, 4, 5, 5)
    assert relative_error(rewritten(MergeSkips(), module, x), module, x) > 10 * TOLERANCE
