import pytest
import torch
from passes_checks import assert_untouched, relative_error, rewritten
from torch import Tensor, nn

from mobilemix.passes.share_constants import ShareConstants


class Layers(nn.Module):
    """Two layers that hold the same grid, the second beside one that differs in shape, and one in its last number."""

    def __init__(self, *last: float) -> None:
        super().__init__()
        grid = torch.linspace(0, 1, 6)
        self.grid, self.again = nn.Buffer(grid), nn.Buffer(grid.clone())
        self.column = nn.Buffer(grid.reshape(2, 3))
        self.other = nn.Buffer(torch.cat((grid[:-1], torch.tensor(last))))
        self.filter = nn.Parameter(torch.polar(grid, grid))

    def forward(self, x: Tensor) -> Tensor:
        y = (x * self.grid + x.exp() * self.again) * self.other
        return y + self.column.sum() + (x * self.filter).real


def test_equal_constants_are_one() -> None:
    module, x = Layers(1.5), torch.randn(2, 6)
    program = rewritten(ShareConstants(), module, x)
    assert set(program.state_dict) == {"grid", "column", "other", "filter"}
    assert relative_error(program, module, x) < 1e-6


def test_what_differs_in_one_number_or_dtype_stays() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ones, self.others, self.counts = (
                nn.Buffer(torch.ones(4)),
                nn.Buffer(torch.ones(4)),
                nn.Buffer(torch.ones(4).view(torch.int32)),
            )
            self.others[3] = 1 + 2**-23

        def forward(self, x: Tensor) -> Tensor:
            return x * self.ones - x.exp() * self.others + self.counts

    assert_untouched(ShareConstants(), Pair(), torch.randn(4))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 1)])
def test_constants_of_any_layout_are_compared(shape: tuple[int, ...]) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pairs = torch.ones(shape, dtype=torch.complex64)
            self.one, self.other, self.count = nn.Buffer(pairs.real), nn.Buffer(pairs.real), nn.Buffer(pairs.real.int())

        def forward(self, x: Tensor) -> Tensor:
            return x * self.one + x.exp() * self.other + self.count

    assert len(rewritten(ShareConstants(), Parts(), torch.randn(2, 1)).state_dict) == 2
