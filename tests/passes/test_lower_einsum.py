import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten
from torch import Tensor, nn

from mobilemix.passes import lower_einsum
from mobilemix.passes.lower_einsum import LowerEinsum


class Sum(nn.Module):
    """An Einstein sum of the input and a parameter, or of two inputs."""

    def __init__(self, equation: str, *weight: int, weight_first: bool = False):
        super().__init__()
        self.equation, self.weight_first = equation, weight_first
        self.weight = nn.Parameter(torch.randn(weight)) if weight else None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        if self.weight is None:
            return torch.einsum(self.equation, x, y)
        return torch.einsum(self.equation, *((self.weight, x) if self.weight_first else (x, self.weight)))


WEIGHTED = {
    "bgihw,gio->bgohw": ((2, 2, 3, 4, 5), (2, 3, 6), "conv2d"),
    "bngi,gio->bngo": ((2, 7, 2, 3), (2, 3, 4), "matmul"),
    "...bi,bio->...bo": ((2, 3, 4, 2, 3), (2, 3, 4), "matmul"),
    "bixy,ioxy->boxy": ((2, 3, 4, 5), (3, 6, 4, 5), "matmul"),
    "bi,oi->bo": ((2, 3), (4, 3), "linear"),
    "bnhd,hdo->bno": ((2, 3, 4, 5), (4, 5, 6), "linear"),
    "bct,co->bot": ((2, 3, 4), (3, 5), "conv1d"),
    "bcthw,co->bothw": ((2, 3, 4, 2, 2), (3, 5), "conv2d"),
    "bn...,nm->bm...": ((2, 3, 4, 5), (3, 6), "conv2d"),
    "bchw,chw->bchw": ((2, 3, 4, 5), (3, 4, 5), "mul"),
    "abc,bd->ad": ((2, 3, 4), (3, 5), "linear"),
}
DYNAMIC = {
    "bhqd,bhkd->bhqk": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "bnhd,bmhd->bhnm": ((2, 3, 4, 5), (2, 6, 4, 5)),
    "ij,jk": ((3, 4), (4, 5)),
    "...ij,...jk": ((2, 3, 4), (2, 4, 5)),
    "i,j->ji": ((3,), (4,)),
    "ab,ab->": ((2, 3), (2, 3)),
    "ba,ab->a": ((2, 3), (3, 2)),
}


@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("equation", WEIGHTED)
def test_sums_with_a_weight_take_the_form_that_runtimes_are_fast_at(equation: str, weight_first: bool) -> None:
    shape, weight, operator = WEIGHTED[equation]
    if weight_first:
        left, right, result = equation.replace("->", ",").split(",")
        equation = f"{right},{left}->{result}"
    module, x = Sum(equation, *weight, weight_first=weight_first), torch.randn(shape)
    program = rewritten(LowerEinsum(), module, x)
    assert operators(program)[operator] == 1
    assert "einsum" not in operators(program)
    assert relative_error(program, module, x) < TOLERANCE


@pytest.mark.parametrize("equation", DYNAMIC)
def test_sums_of_two_inputs(equation: str) -> None:
    inputs = tuple(map(torch.randn, DYNAMIC[equation]))
    program = rewritten(LowerEinsum(), Sum(equation), *inputs)
    assert "einsum" not in operators(program)
    assert relative_error(program, Sum(equation), *inputs) < TOLERANCE


@st.composite
def sums(draw: st.DrawFn) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    labels = "abcde"
    sizes = {label: draw(st.integers(1, 4)) for label in labels}
    left = "".join(draw(st.permutations(labels))[: draw(st.integers(1, 4))])
    right = "".join(draw(st.permutations(labels))[: draw(st.integers(1, 4))])
    union = sorted(set(left + right))
    result = "".join(draw(st.permutations(union))[: draw(st.integers(0, len(union)))])
    return f"{left},{right}->{result}", tuple(sizes[i] for i in left), tuple(sizes[i] for i in right)


@given(case=sums(), static=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_sum(case: tuple[str, tuple[int, ...], tuple[int, ...]], static: bool) -> None:
    equation, left, right = case
    torch.manual_seed(0)
    module = Sum(equation, *right) if static else Sum(equation)
    if module.weight is not None:
        module.weight.data.abs_()  # terms of both signs cancel, and what is left of float32 is no fault of the pass
    inputs = (torch.rand(left),) if static else (torch.rand(left), torch.rand(right))
    program = rewritten(LowerEinsum(), module, *inputs)
    assert "einsum" not in operators(program)
    assert relative_error(program, module, *inputs) < TOLERANCE
    ranks = [node.meta["val"].dim() for node in program.graph.nodes if node.op == "call_function"]
    assert max(ranks, default=0) <= max(len(left), len(right), 3, len(equation.partition("->")[2]))


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [("ii,ij->j", ((3, 3), (3, 4))), ("bi,bj->ij", ((1, 3), (4, 3)))],
    ids=["diagonal", "broadcast"],
)
def test_other_sums_stay(equation: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    assert_untouched(LowerEinsum(), Sum(equation), *map(torch.randn, shapes))


def test_a_swapped_weight_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lower_einsum._Sum._arrange

    def wrong(self: lower_einsum._Sum, term: lower_einsum._Term, order: str) -> torch.fx.Node:
        return term.node if term is self._b else right(self, term, order)

    monkeypatch.setattr(lower_einsum._Sum, "_arrange", wrong)
    module, x = Sum("bchw,co->bohw", 3, 3), torch.randn(1, 3, 4, 4)
    assert relative_error(rewritten(LowerEinsum(), module, x), module, x) > 10 * TOLERANCE
