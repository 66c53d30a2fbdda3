import pytest
import torch
from torch import nn

from mobilemix.capture import capture
from mobilemix.parity import noise
from mobilemix.signature import ANY_INTEGER, Input, inputs_of, outputs_of


class Tokens(nn.Module):
    """Every way in which an integer input finds a table, and one in which it finds none."""

    def __init__(self):
        super().__init__()
        self.words, self.kinds = nn.Embedding(50, 4), nn.Embedding(7, 4)
        self.table = nn.Buffer(torch.ones(5, 4, 9))

    def forward(self, ids, kinds, row, column, place, count, mask, x):
        y = self.words(ids) + self.kinds(kinds.reshape(1, -1)[:, :3].long()) + self.words(kinds)
        y = y + self.table[row].sum() + self.table[:, :, column].sum() + self.table.index_select(1, place).sum()
        return y * count + mask.sum() + x.sum(), ids


@pytest.fixture(scope="module")
def program():
    ids = [torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int32)]
    places = [torch.zeros(2, dtype=torch.int64) for _ in range(3)]
    others = [torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.bool), torch.zeros(2)]
    return capture(Tokens(), (*ids, *places, *others))


def test_integers_are_bounded_by_the_smallest_table_that_they_index(program):
    assert inputs_of(program) == (
        Input("ids", (1, 3), "int64", 50),
        Input("kinds", (1, 3), "int32", 7),
        Input("row", (2,), "int64", 5),
        Input("column", (2,), "int64", 9),
        Input("place", (2,), "int64", 4),
        Input("count", (1,), "int64", ANY_INTEGER),
        Input("mask", (2,), "bool", ANY_INTEGER),
        Input("x", (2,), "float32", ANY_INTEGER),
    )


def test_outputs_have_shapes_and_dtypes(program):
    assert outputs_of(program) == (((1, 3, 4), "float32"), ((1, 3), "int64"))


def test_noise_has_each_inputs_dtype_and_stays_below_its_bound(program):
    samples = noise(inputs_of(program), 20)
    for each in inputs_of(program):
        drawn = [sample[each.name] for sample in samples]
        assert all(value.dtype == each.dtype and value.shape == each.shape for value in drawn)
        if each.dtype != "float32":
            assert set(range(each.below)) >= {int(number) for value in drawn for number in value.ravel()}
            assert max(int(value.max()) for value in drawn) >= 0.9 * (each.below - 1)
