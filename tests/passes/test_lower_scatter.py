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


def test_nothing_to_lower() -> None:
    assert_untouched(LowerScatter(), nn.ReLU(), torch.randn(5, 6))
