import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import assert_untouched, operators, rewritten
from torch import Tensor, nn

from mobilemix.passes.lower_scatter import LowerScatter


class Assign(nn.Module):
    """x with what `place` selects doubled."""

    def __init__(self, place: tuple[int | slice, ...]):
        super().__init__()
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        y = x * 1
        y[self.place] = 2 * x[self.place]
        return y


BOUNDS = st.integers(-7, 7) | st.none()
PLACES = st.lists(st.builds(slice, BOUNDS, BOUNDS) | st.integers(-5, 4), min_size=1, max_size=3).map(tuple)


@given(PLACES)
@settings(max_examples=25, deadline=None)
def test_assignments_become_concatenations(place: tuple[int | slice, ...]) -> None:
    module, x = Assign(place), torch.randn(5, 6, 7)
    program = rewritten(LowerScatter(), module, x)
    assert not [name for name in operators(program) if "scatter" in name or "copy" in name]
    assert torch.equal(program.module()(x), module(x))


def test_a_broadcast_number_of_another_dtype() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x * 1
            y[:, 1:3] = torch.ones(1, dtype=torch.int64)
            return y

    x = torch.randn(2, 4)
    program = rewritten(LowerScatter(), Module(), x)
    assert torch.equal(program.module()(x), Module()(x))


def test_a_step_stays() -> None:
    found = operators(rewritten(LowerScatter(), Assign((slice(None, None, 2),)), torch.randn(5, 6)))
    assert found["slice_scatter"] == 1, "only the copy into the part is gone"


class CrossScan(nn.Module):
    """A map read along rows and along columns, forwards and backwards, as VMamba's code puts it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty((x.shape[0], 4, x.shape[1], x.shape[2] * x.shape[3]))
        y[:, 0] = x.flatten(2, 3)
        y[:, 1] = x.transpose(2, 3).flatten(2, 3)
        y[:, 2:4] = torch.flip(y[:, 0:2], dims=[-1])
        return y


class Outputs(nn.Module):
    """A loop over time that writes each output into a tensor and reads what it wrote."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for step in range(x.shape[1]):
            y[:, step] = x[:, step] + (y[:, step - 1] if step else 0)
        return y


def test_assignments_that_cover_a_tensor_are_one_concatenation() -> None:
    x = torch.randn(2, 3, 4, 5)
    program = rewritten(LowerScatter(), CrossScan(), x)
    found = operators(program)
    assert found["cat"] == 2, "the two directions for the flip, and all four"
    assert not {"new_empty", "slice", "slice_scatter"} & set(found)
    assert torch.equal(program.module()(x), CrossScan()(x))


@pytest.mark.parametrize("module", [Outputs(), nn.Sequential(Outputs(), Outputs())])
def test_loops_that_read_what_they_wrote(module: nn.Module) -> None:
    x = torch.randn(2, 5, 3)
    program = rewritten(LowerScatter(), module, x)
    assert torch.equal(program.module()(x), module(x))


@given(st.lists(st.tuples(PLACES, st.booleans()), min_size=2, max_size=4))
@settings(max_examples=25, deadline=None)
def test_chains_of_assignments(places: list[tuple[tuple[int | slice, ...], bool]]) -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y, seen = x * 1, 0
            for number, (place, is_read) in enumerate(places):
                y[place] = (number + 2) * x[place]
                seen = seen + (y[place].sum() if is_read else 0)
            return y + seen

    x = torch.randint(-4, 4, (5, 6, 7)).float()  # whole numbers, so that no order of summation matters
    program = rewritten(LowerScatter(), Module(), x)
    assert torch.equal(program.module()(x), Module()(x))


def test_nothing_to_lower() -> None:
    assert_untouched(LowerScatter(), nn.ReLU(), torch.randn(5, 6))
