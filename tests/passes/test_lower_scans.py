"""The lowerings of the three scans, each alone, against their float64 references."""

import math

import pytest
import torch
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten
from torch import nn

from mobilemix import ops
from mobilemix.capture import capture
from mobilemix.passes import lower
from mobilemix.passes.lower_linear_scan import LowerLinearScan
from mobilemix.passes.lower_selective_scan import LowerSelectiveScan
from mobilemix.passes.lower_ssd_chunk_scan import LowerSsdChunkScan

LENGTHS = (1, 2, 7, 16, 17, 49, 65, 197)


class Call(nn.Module):
    """A scan of its inputs, by name, with options."""

    def __init__(self, scan, names, **options):
        super().__init__()
        self.scan, self.names, self.options = scan, names, options

    def forward(self, *values):
        return self.scan(**dict(zip(self.names, values, strict=True)), **self.options)


def selective(length, b="bnl", c="bnl", batch=2, channels=6, states=3, groups=1, **options):
    torch.manual_seed(length)
    shapes = {"dn": (channels, states), "bnl": (batch, states, length), "bgnl": (batch, groups, states, length)}
    given = {"u": torch.randn(batch, channels, length), "delta": torch.randn(batch, channels, length).abs()}
    given |= {"A": -4 * torch.rand(channels, states), "B": torch.randn(shapes[b]), "C": torch.randn(shapes[c])}
    if options.pop("gates", False):
        given |= {"D": torch.randn(channels), "z": torch.randn(batch, channels, length)}
        given |= {"delta_bias": torch.randn(channels)}
        options["delta_softplus"] = True
    return Call(ops.selective_scan, tuple(given), **options), tuple(given.values())


def ssd(length, batch=2, heads=4, groups=2, gates=False, wide=False, initial=False, **options):
    torch.manual_seed(length)
    given = {"x": torch.randn(batch, length, heads, 3), "dt": torch.rand(batch, length, heads) / 2}
    given |= {"A": -torch.rand(heads) * 4, "B": torch.randn(batch, length, groups, 5)}
    given |= {"C": torch.randn(batch, length, groups, 5)}
    if gates:
        given |= {"D": torch.randn(heads, 3) if wide else torch.randn(heads), "z": torch.randn(batch, length, heads, 3)}
        given |= {"dt_bias": torch.randn(heads)}
        options["dt_softplus"] = True
    if initial:
        given["initial_states"] = torch.randn(batch, heads, 3, 5)
    return Call(ops.ssd_chunk_scan, tuple(given), chunk_size=8, **options), tuple(given.values())


def plain(program):
    return not any("scan" in name for name in operators(program))


def most_axes(program):
    values = [node.meta["val"] for node in program.graph.nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    return max(value.dim() for value in values)


def assert_lowered(module, inputs):
    program = lower(capture(module, inputs))
    assert plain(program)
    assert most_axes(program) <= 5
    assert relative_error(program, module, *inputs) <= TOLERANCE
    return program


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("gates", [False, True])
def test_selective_scan(length, gates):
    module, inputs = selective(length, gates=gates, return_last_state=True)
    assert_lowered(module, inputs)


@pytest.mark.parametrize(("b", "c"), [("dn", "bnl"), ("bnl", "dn"), ("dn", "dn"), ("bgnl", "bnl"), ("bgnl", "dn")])
@pytest.mark.parametrize("batch", [1, 2])
def test_selective_scan_takes_every_form_of_b_and_c(b, c, batch):
    module, inputs = selective(20, b, c, batch=batch, groups=3, return_last_state=True)
    assert_lowered(module, inputs)


@pytest.mark.parametrize(("b", "c"), [(2, 3), (1, 6), (6, 1)])
def test_groups_of_b_and_c_may_differ(b, c):
    module, inputs = selective(20, "bgnl", "bgnl", groups=1)
    inputs = *inputs[:3], torch.randn(2, b, 3, 20), torch.randn(2, c, 3, 20)
    assert_lowered(module, inputs)


def test_one_state_needs_no_matrix_product():
    module, inputs = selective(49, states=1, groups=2, b="bgnl", c="bgnl")
    assert "matmul" not in operators(assert_lowered(module, inputs))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_ssd(length, groups):
    module, inputs = ssd(length, groups=groups, return_final_states=True)
    assert_lowered(module, inputs)


@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.1, 0.4)])
def test_ssd_options(initial, wide, limit):
    for length in (20, 100):
        module, inputs = ssd(length, gates=True, wide=wide, initial=initial, dt_limit=limit)
        assert_lowered(module, inputs)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("initial", [None, (2, 3, 4), (4,)])
@pytest.mark.parametrize("decay", [(2, 3, 4), (2, 1, 1), (1, 3, 1)])
def test_linear_scan(length, initial, decay):
    torch.manual_seed(length)
    inputs = torch.rand(length, *decay), torch.randn(length, 2, 3, 4)
    names = ("a", "b")
    if initial is not None:
        inputs, names = (*inputs, torch.randn(initial)), (*names, "initial")
    assert_lowered(Call(ops.linear_scan, names), inputs)


def test_the_value_may_be_broadcast_too():
    inputs = torch.rand(40, 2, 3), torch.randn(40, 1, 3)
    assert_lowered(Call(ops.linear_scan, ("a", "b")), inputs)


def test_an_unused_last_state_costs_nothing():
    with_state, inputs = selective(49, return_last_state=True)
    without, _ = selective(49)
    sizes = [
        sum(operators(rewritten(LowerSelectiveScan(), module, *inputs)).values()) for module in (with_state, without)
    ]
    assert sizes[1] < sizes[0]


def test_graphs_grow_slowly_with_length():
    """Loops written step by step have two operators for each step at least."""
    for length, most in ((196, 220), (784, 260), (3136, 330)):
        module, inputs = selective(length, batch=1, channels=2, states=2)
        assert sum(operators(lower(capture(module, inputs))).values()) <= most
    module, inputs = ssd(3136, batch=1, heads=2, groups=1)
    assert sum(operators(lower(capture(module, inputs))).values()) <= 60


def test_recurrences_are_marked_as_float32():
    module, inputs = selective(49)
    program = lower(capture(module, inputs))
    names = [node.name for node in program.graph.nodes if node.target is torch.ops.aten.exp.default]
    assert names
    assert all(name.startswith("wide_exp") for name in names)


class Decay(nn.Module):
    """A recurrence whose decays come from an exponential by way of other operators."""

    def forward(self, x):
        rates = torch.nn.functional.softplus(x)
        first, second = (torch.exp(-rates) * 0.5).permute(2, 0, 1).chunk(2, 1)
        return ops.linear_scan((1 - first) * second, x.permute(2, 0, 1).chunk(2, 1)[0])


@pytest.mark.parametrize("stays", [False, True])
def test_so_are_decays(stays):
    x = torch.randn(4, 3, 20)
    program = rewritten(LowerLinearScan(lambda node: stays), Decay(), x)
    names = [node.name for node in program.graph.nodes]
    assert {"wide_exp", "wide_rsub", "wide_permute", "wide_chunk"} <= set(names)
    assert {"softplus", "neg", "permute_1"} <= set(names), "what comes before, and the inputs, may be rounded"
    assert relative_error(program, Decay(), x) <= TOLERANCE


def test_scans_that_stay():
    module, inputs = selective(49)
    assert_untouched(LowerSelectiveScan(lambda node: True), module, *inputs)
    inputs = torch.rand(5, 3), torch.rand(5, 3)
    assert_untouched(LowerLinearScan(lambda node: True), Call(ops.linear_scan, ("a", "b")), *inputs)


@pytest.mark.parametrize("step", [LowerSelectiveScan(), LowerSsdChunkScan(), LowerLinearScan()])
def test_others_are_untouched(step):
    assert_untouched(step, nn.Linear(3, 3), torch.rand(2, 3))
