import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten
from torch import Tensor, nn

from mobilemix.passes import compose_linear
from mobilemix.passes.compose_linear import ComposeLinear


@given(
    bias=st.tuples(st.booleans(), st.booleans()),
    read=st.integers(1, 4),
    between=st.integers(4, 6),
    made=st.integers(1, 4),
)
@settings(max_examples=12, deadline=None)
def test_two_linear_maps_are_one(bias: tuple[bool, bool], read: int, between: int, made: int) -> None:
    module = nn.Sequential(nn.Linear(read, between, bias=bias[0]), nn.Linear(between, made, bias=bias[1]))
    x = torch.randn(2, 3, read)
    program = rewritten(ComposeLinear(), module, x)
    assert operators(program) == {"linear": 1}
    assert relative_error(program, module, x) < TOLERANCE


@given(kernel=st.integers(1, 3), stride=st.integers(1, 2), padding=st.integers(0, 1))
@settings(max_examples=10, deadline=None)
def test_a_pointwise_convolution_goes_into_any_other(kernel: int, stride: int, padding: int) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, kernel, stride, padding), nn.Conv2d(8, 5, 1))
    x = torch.randn(2, 3, 7, 6)
    program = rewritten(ComposeLinear(), module, x)
    assert operators(program) == {"conv2d": 1}
    assert relative_error(program, module, x) < TOLERANCE


def test_three_are_one() -> None:
    module, x = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 9), nn.Linear(9, 2)), torch.randn(2, 3)
    program = rewritten(ComposeLinear(), module, x)
    assert operators(program) == {"linear": 1}
    assert relative_error(program, module, x) < TOLERANCE


class Fusion(nn.Module):
    """A projection beside the input that it is fused with."""

    def __init__(self, kernel: int = 1):
        super().__init__()
        self.project = nn.Conv2d(4, 6, kernel, padding=kernel // 2)
        self.fuse = nn.Conv2d(3 + 6 + 4, 5, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.fuse(torch.cat((x, self.project(z), z.relu()), 1))


def test_parts_of_a_concatenation() -> None:
    module, inputs = Fusion(), (torch.randn(2, 3, 5, 4), torch.randn(2, 4, 5, 4))
    program = rewritten(ComposeLinear(), module, *inputs)
    assert operators(program) == {"conv2d": 1, "cat": 1, "relu": 1}
    assert relative_error(program, module, *inputs) < TOLERANCE


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)
        return self.b(y), y


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        pytest.param(Twice(), [(2, 4)], id="another user"),
        pytest.param(nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 8)), [(2, 8)], id="low rank"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3)), [(1, 3, 5, 5)], id="kernel last"),
        pytest.param(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, 2)), [(1, 3, 5, 5)], id="stride last"),
        pytest.param(
            nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, padding=1)), [(1, 3, 5, 5)], id="border last"
        ),
        pytest.param(
            nn.Sequential(nn.Conv2d(4, 8, 1, groups=2), nn.Conv2d(8, 4, 1)), [(1, 4, 5, 5)], id="groups first"
        ),
        pytest.param(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=2)), [(1, 3, 5, 5)], id="groups last"),
        pytest.param(nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)), [(2, 4)], id="activation"),
        pytest.param(Fusion(3), [(1, 3, 5, 5), (1, 4, 5, 5)], id="kernel in a part"),
    ],
)
def test_other_pairs_stay(module: nn.Module, shapes: list[tuple[int, ...]]) -> None:
    assert_untouched(ComposeLinear(), module, *map(torch.randn, shapes))


def test_a_lost_bias_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = compose_linear._product
    monkeypatch.setattr(compose_linear, "_product", lambda e, n, weight, bias: (right(e, n, weight, bias)[0], bias))
    module, x = nn.Sequential(nn.Linear(3, 9), nn.Linear(9, 2)), torch.randn(2, 3)
    assert relative_error(rewritten(ComposeLinear(), module, x), module, x) > 10 * TOLERANCE
