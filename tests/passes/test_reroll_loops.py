"""Unrolled loops over time. Every loop runs over axis 2 of a and b (2, 3, L, 4) and c (2, 4, L)."""

import sys
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from passes_checks import TOLERANCE, operators, relative_error
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from mobilemix.capture import capture
from mobilemix.passes.remove_no_ops import RemoveNoOps
from mobilemix.passes.reroll_loops import RerollLoops

FLOAT64_TOLERANCE = 1e-13
"""Of a sum in another order."""
RANDOM_TOLERANCE = 1e-11
"""Where that sum is normalised, or nearly cancels."""

Loop = Callable[..., Any]


class Case(nn.Module):
    def __init__(self, loop: Loop):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.loop = loop
        self.A = nn.Parameter(-torch.rand(3, 4, generator=generator))
        self.w = nn.Parameter(torch.randn(4, 4, generator=generator))
        self.h0 = nn.Parameter(torch.randn(4, generator=generator))

    def forward(self, a: Tensor, b: Tensor, c: Tensor) -> Any:
        return self.loop(self, a, b, c)


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture in the dtype of the module."""
    monkeypatch.setattr(sys.modules["mobilemix.capture"], "_narrow", lambda value: value)


def inputs(length: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, length, 4, generator=generator, dtype=dtype)
    b = torch.randn(2, 3, length, 4, generator=generator, dtype=dtype)
    return a, b, torch.randn(2, 4, length, generator=generator, dtype=dtype)


def captured(module: nn.Module, *given: Tensor) -> ExportedProgram:
    return RemoveNoOps()(capture(module, given)).program


def rerolled(module: nn.Module, *given: Tensor) -> ExportedProgram:
    program = captured(module, *given)
    before = str(program.graph)
    result = RerollLoops()(program)
    assert result.modified
    assert str(program.graph) == before, "a pass must not change the program that it is given"
    assert not RerollLoops()(result.program).modified, "a second run finds more to do"
    return result.program


def assert_stays(module: nn.Module, *given: Tensor) -> None:
    program = captured(module, *given)
    result = RerollLoops()(program)
    assert not result.modified
    assert result.program is program


def steps(a: Tensor) -> range:
    return range(a.shape[2])


LOOPS: dict[str, Loop] = {}
STAY: dict[str, Loop] = {}


def loop(function: Loop) -> Loop:
    LOOPS[function.__name__] = function
    return function


def stays(function: Loop) -> Loop:
    STAY[function.__name__] = function
    return function


@loop
def selective_scan_with_einsum(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = a.new_zeros(2, 3, 4), []
    for i in steps(a):
        h = a[:, :, i] * h + b[:, :, i]
        ys.append(torch.einsum("bdn,bn->bd", h, c[:, :, i]))
    return torch.stack(ys, dim=2), h


@loop
def selective_scan_from_zero(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = 0, []
    for i in steps(a):
        h = a[:, :, i] * h + b[:, :, i]
        ys.append((h * c[:, None, :, i]).sum(-1, keepdim=True))
    return torch.cat(ys, dim=2)


@loop
def selective_scan_with_matmul(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = a.new_zeros(2, 3, 4), []
    for i in steps(a):
        h = a[:, :, i, :] * h + b[:, :, i, :]
        ys.append(torch.matmul(h, c[:, :, i].unsqueeze(-1))[:, :, 0])
    return torch.stack(ys, dim=-1)


@loop
def discretised_in_the_loop(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys, u, delta = b.new_zeros(2, 3, 4), [], b[..., 0], a[..., 0]
    for i in steps(a):
        step = F.softplus(delta[:, :, i]).unsqueeze(-1)
        h = torch.exp(step * m.A) * h + step * (c[:, :, i].unsqueeze(1) * u[:, :, i, None])
        ys.append(((h * c[:, :, i].unsqueeze(1)).sum(-1) + u[:, :, i] * m.A[:, 0]).unsqueeze(-1))
    return torch.cat(ys, -1)


@loop
def four_directions(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    xs = torch.stack((b, b.flip(2), b * 2, b.flip(2) * 2), 1)
    decays, h, ys = torch.stack((a, a.flip(2), a, a), 1), b.new_zeros(2, 4, 3, 4), []
    for i in steps(a):
        h = decays[:, :, :, i] * h + xs[:, :, :, i]
        ys.append(torch.einsum("bkdn,bn->bkd", h, c[:, :, i]))
    y = torch.stack(ys, -1)
    return y[:, 0] + y[:, 1].flip(-1) + y[:, 2] + y[:, 3].flip(-1)


@loop
def assigned(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, y = a.new_zeros(2, 3, 4), a.new_zeros(2, 3, a.shape[2])
    for i in steps(a):
        h = a[:, :, i] * h + b[:, :, i]
        y[:, :, i] = (h @ c[:, :, i, None]).squeeze(-1)
    return y


@loop
def assigned_to_a_part(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, y = a.new_zeros(2, 3, 4), a.new_ones(2, a.shape[2] + 2, 3, 4)
    for i in reversed(steps(a)):
        h = a[:, :, i] * h + b[:, :, i]
        y[:, i + 1 : i + 2] = h.unsqueeze(1)
    return y


@loop
def state_in_the_output(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    y = torch.zeros_like(b)
    y[:, :, 0] = b[:, :, 0]
    for i in steps(a)[1:]:
        y[:, :, i] = a[:, :, i] * y[:, :, i - 1] + b[:, :, i]
    return y


@loop
def in_place_of_the_input(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    y = b.clone()
    for i in steps(a)[1:]:
        y[:, :, i] += a[:, :, i] * y[:, :, i - 1]
    return y


@loop
def in_place_of_the_state(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = a.new_zeros(2, 3, 4), []
    for i in steps(a):
        h.mul_(a[:, :, i]).add_(b[:, :, i])
        ys.append(h.clone())
    return torch.stack(ys)


@loop
def reversed_in_time(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = a.new_zeros(2, 3, 4), []
    for i in reversed(steps(a)):
        h = a[:, :, i] * h + b[:, :, i]
        ys.insert(0, h @ m.w)
    return torch.stack(ys, dim=1).tanh()


@loop
def both_directions(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, forth, back = a.new_zeros(2, 3, 4), [], []
    for i in steps(a):
        h = a[:, :, i] * h + b[:, :, i]
        forth.append(h)
    h = a.new_zeros(2, 3, 4)
    for i in reversed(steps(a)):
        h = a[:, :, i] * h + b[:, :, i]
        back.append(h)
    return torch.stack(forth, 1) + torch.stack(back[::-1], 1)


@loop
def learned_initial_state(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = m.h0, [m.h0.expand(2, 3, 4)]
    for i in steps(a):
        h = a[:, :, i] * h + b[:, :, i]
        ys.append(h)
    return torch.stack(ys, 1), h.mean(0)


@loop
def read_before_the_step(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = a.new_zeros(2, 3, 4), []
    for i in steps(a):
        ys.append(h + b[:, :, i])
        h = a[:, :, i] * h + b[:, :, i]
    return torch.stack(ys, 1), h


@loop
def exponential_moving_averages(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    fast, slow = b[:, :, 0], b[:, :, 0] * 0
    ys, zs = [fast], []
    for i in steps(a)[1:]:
        fast = torch.lerp(fast, b[:, :, i], 0.1)
        slow = 0.2 * fast + slow * 0.8
        ys.append(fast)
        zs.append(torch.cat((fast, slow), -1))
    return torch.stack(ys, 2), torch.stack(zs, 2), fast, slow


@loop
def min_gru(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 4), []
    for i in steps(a):
        z, n = torch.sigmoid(F.linear(b[:, :, i], m.w)), torch.tanh(a[:, :, i] @ m.w)
        h = (1 - z) * h + z * n
        ys.append(h)
    return torch.stack(ys, 1)


@loop
def min_lstm(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 4), []
    for x in b.unbind(2):
        forget, enter, value = F.linear(x, torch.cat((m.w, m.w * 2, m.w * 3))).chunk(3, -1)
        forget, enter = forget.sigmoid(), enter.sigmoid()
        h = forget / (forget + enter) * h + enter / (forget + enter) * value
        ys.append(h)
    return torch.stack(ys, 1)


@loop
def rg_lru(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, y = b.new_zeros(2, 3, 4), torch.zeros_like(b)
    for i in steps(a):
        log_decay = -8 * F.softplus(m.A) * torch.sigmoid(a[:, :, i])
        h = torch.exp(log_decay) * h
        h = h + torch.sqrt(1 - torch.exp(2 * log_decay)) * b[:, :, i]
        y[:, :, i] = h
    return y


@loop
def s4d_real(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 4), []
    for i in steps(a):
        h = torch.exp(m.A) * h + b[:, :, i] * m.A
        ys.append(2 * (h * m.h0).sum(-1))
    return torch.stack(ys, -1)


@loop
def rwkv_4(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    k, v, decay, bonus = a, b, torch.exp(m.A), m.h0
    numerator, denominator, ys = b.new_zeros(2, 3, 4), b.new_zeros(2, 3, 4), []
    for i in steps(a):
        now = torch.exp(bonus + k[:, :, i])
        ys.append((numerator + now * v[:, :, i]) / (denominator + now))
        numerator = decay * numerator + torch.exp(k[:, :, i]) * v[:, :, i]
        denominator = decay * denominator + torch.exp(k[:, :, i])
    return torch.stack(ys, 2)


@loop
def linear_attention(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    q, k, v = a[:, 0], b[:, 1], b[:, 2]
    state, ys = b.new_zeros(2, 4, 4), []
    for i in range(q.shape[1]):
        state = state + k[:, i, :, None] * v[:, i, None, :]
        ys.append(torch.einsum("bi,bij->bj", q[:, i], state))
    return torch.stack(ys, 1), state


@loop
def decay_of_each_head(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys, decay = b.new_zeros(2, 3, 4), [], torch.sigmoid(c[0, 0])
    for i in steps(a):
        h = decay[i] * h + (1 - decay[i]) * b[:, :, i]
        ys.append(F.layer_norm(h, (4,)).softmax(-1).flatten(1))
    return torch.stack(ys, 1)


@loop
def addcmul(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_ones(2, 3, 4), []
    for decay, value, read in zip(a.unbind(2), b.split(1, 2), c.chunk(c.shape[2], 2), strict=True):
        h = torch.addcmul(value.squeeze(2), decay, h, value=0.5)
        ys.append(h * read.squeeze(2).unsqueeze(1))
    return torch.stack(ys, -2), h


@loop
def masked(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 4), []
    for i in steps(a):
        h = torch.where(a[:, :, i] > 0.5, a[:, :, i] * h + b[:, :, i], h)
        ys.append(h)
    return torch.stack(ys, 1)


@loop
def state_reset(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 4), []
    for i in steps(a):
        h = torch.where(a[:, :, i] > 0.5, -(b[:, :, i] - h) / 2, torch.zeros_like(h))
        ys.append(h)
    return torch.stack(ys, 1)


@loop
def growing_concatenation(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, y = b.new_zeros(2, 3, 4), b.new_zeros(2, 1, 3, 4)
    for i in steps(a):
        h = h - h * a[:, :, i] / 2 + b[:, :, i]
        y = torch.cat((y, h.unsqueeze(1)), 1)
    return y


@loop
def slices_with_their_axis(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 1, 4), []
    for i in steps(a):
        h = a[:, :, i : i + 1] * h + b.narrow(2, i, 1)
        ys.append(h)
    return torch.cat(ys, 2)


@loop
def two_entries_a_step(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 2, 4), []
    for i in range(0, a.shape[2], 2):
        h = a[:, :, i : i + 2] * h + b[:, :, i : i + 2]
        ys.append(h * c[:, :, i].unsqueeze(1).unsqueeze(1))
    return torch.cat(ys, 2)


@loop
def every_other_step(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 4), []
    for i in steps(a):
        h = a[:, :, i] * h + b[:, :, -1 - i]
        ys.append(h)
    return torch.stack(ys[1::2])


@loop
def lists_of_coefficients(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    decays, values = [a[:, :, i].exp() / 3 for i in steps(a)], [b[:, :, i] * c[:, None, :, i] for i in steps(a)]
    h, ys = None, []
    for decay, value in zip(decays, values, strict=True):
        h = value if h is None else decay * h + value
        ys.append(h.sum(-1))
    return torch.stack(ys, 2)


@loop
def loop_after_loop(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 4), []
    for i in steps(a):
        h = a[:, :, i] * h + b[:, :, i]
        ys.append(h)
    for i in steps(a):
        h = h * b[:, :, i].sigmoid() - a[:, :, i]
        ys.append(h)
    return torch.stack(ys, 1)


@loop
def loop_in_a_loop(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    x = torch.stack((a, b), 2)
    h, ys = b.new_zeros(2, 3, 4), []
    for i in range(2):
        for j in steps(a):
            h = 0.5 * h + x[:, :, i, j]
            ys.append(h)
    return torch.stack(ys, 1)


@loop
def two_layers(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    x = b
    for _ in range(2):
        h, ys = b.new_zeros(2, 3, 4), []
        for i in steps(a):
            h = a[:, :, i] * h + x[:, :, i]
            ys.append(h)
        x = x + torch.stack(ys, 2) @ m.w
    return x


@loop
def momentum(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    place, speed, ys = b.new_zeros(2, 3, 4), b.new_zeros(2, 3, 4), []
    for i in steps(a):
        speed = 0.9 * speed + b[:, :, i]
        place = place - 0.1 * speed
        ys.append(place)
    return torch.stack(ys, 1)


@loop
def two_updates_a_step(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 4), []
    for i in steps(a):
        h = a[:, :, i] * h + b[:, :, i]
        h = a[:, :, i] * h + b[:, :, i]
        ys.append(h)
    return torch.stack(ys, 1)


@loop
def last_state_alone(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h = b.new_zeros(2, 3, 4)
    for i in steps(a):
        h = a[:, :, i] * h + b[:, :, i]
    return h


@loop
def running_sum(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    total = m.h0
    for i in steps(a):
        total = total + a[:, :, i] * m.A
    return total


@stays
def gru(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 4), []
    for i in steps(a):
        z, n = torch.sigmoid(a[:, :, i] + h @ m.w), torch.tanh(b[:, :, i] + h)
        h = (1 - z) * h + z * n
        ys.append(h)
    return torch.stack(ys, 1)


@stays
def lstm(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    cell, h, ys = b.new_zeros(2, 3, 4), b.new_zeros(2, 3, 4), []
    for i in steps(a):
        cell = torch.sigmoid(h @ m.w + a[:, :, i]) * cell + torch.sigmoid(h + a[:, :, i]) * torch.tanh(b[:, :, i])
        h = torch.tanh(cell) * a[:, :, i]
        ys.append(h)
    return torch.stack(ys, 1)


@stays
def rnn(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h = b.new_zeros(2, 3, 4)
    for i in steps(a):
        h = torch.tanh(a[:, :, i] * h + b[:, :, i])
    return h


@stays
def clamped(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 4), []
    for i in steps(a):
        h = (a[:, :, i] * h + b[:, :, i]).clamp(-1, 1)
        ys.append(h)
    return torch.stack(ys, 1)


@stays
def normalised_inside(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h, ys = b.new_zeros(2, 3, 4), []
    for i in steps(a):
        h = a[:, :, i] * h + b[:, :, i] / (1 + h.square().sum())
        ys.append(h)
    return torch.stack(ys, 1)


@stays
def squared(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h = b[:, :, 0]
    for i in steps(a):
        h = h * h + a[:, :, i]
    return h


@stays
def chosen_by_the_state(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h = b[:, :, 0]
    for i in steps(a):
        h = torch.where(h > 0, a[:, :, i] * h, h + 1)
    return h


@stays
def not_diagonal(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h = b[:, :, 0]
    for i in steps(a):
        h = h @ m.w + a[:, :, i]
    return h


@stays
def rotation(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    x, y = b[:, :, 0], b[:, :, 1]
    for i in steps(a):
        x, y = 0.9 * x - 0.1 * y + a[:, :, i], 0.1 * x + 0.9 * y
    return x


@stays
def second_order(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    now, before = b[:, :, 0], b[:, :, 1]
    for i in steps(a):
        now, before = 0.9 * now - 0.2 * before + a[:, :, i], now
    return now


@stays
def rounded(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h = b[:, :, 0]
    for i in steps(a):
        h = torch.div(h, 2, rounding_mode="floor") + a[:, :, i]
    return h


@stays
def narrower_inside(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h = b[:, :, 0]
    for i in steps(a):
        h = (h * a[:, :, i]).half().to(a.dtype) + b[:, :, i]
    return h


@stays
def other_weights_every_step(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h = b[:, :, 0]
    for i in steps(a):
        h = (0.5 + i / 100) * h + a[:, :, i]
    return h


@stays
def irregular_slices(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h = b[:, :, 0]
    for i in steps(a):
        h = 0.5 * h + a[:, :, i * i % a.shape[2]]
    return h


@stays
def overlapping_slices(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    h = b[:, :, :2]
    for i in steps(a)[:-1]:
        h = 0.5 * h + a[:, :, i : i + 2]
    return h


@stays
def residual_network(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    for _ in range(12):
        a = a + torch.tanh(a @ m.w)
    return a


@stays
def no_recurrence(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
    return torch.stack([a[:, :, i] * b[:, :, i] for i in steps(a)], 1)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_a_scan(name: str) -> None:
    module = Case(LOOPS[name]).double()
    programs = [rerolled(module, *inputs(length)) for length in (18, 20)]
    for program in programs:
        length = program.example_inputs[0][0].shape[2]
        assert relative_error(program, module, *inputs(length)) < FLOAT64_TOLERANCE
        assert {"linear_scan", "cumsum", "sum"} & set(operators(program))
    assert len(programs[0].graph.nodes) == len(programs[1].graph.nodes)


@pytest.mark.parametrize("name", STAY)
def test_other_loops_stay(name: str) -> None:
    assert_stays(Case(STAY[name]), *inputs(12, torch.float32))


def test_float32() -> None:
    given = inputs(32, torch.float32)
    module = Case(discretised_in_the_loop)
    assert relative_error(rerolled(module, *given), module, *given) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_the_graph_does_not_grow(name: str) -> None:
    sizes = {len(rerolled(Case(LOOPS[name]), *inputs(length, torch.float32)).graph.nodes) for length in (16, 64)}
    assert len(sizes) == 1


def test_the_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "mobilemix.passes.reroll_loops")
    assert_stays(Case(gru), *inputs(12, torch.float32))
    assert "aten.sigmoid.default of the state is not affine" in caplog.text
    assert __file__ in caplog.text


@pytest.mark.parametrize(("length", "is_rolled"), [(7, False), (8, True)])
def test_short_loops_stay(length: int, is_rolled: bool) -> None:
    result = RerollLoops()(captured(Case(last_state_alone), *inputs(length, torch.float32)))
    assert result.modified is is_rolled


def test_programs_that_write_into_tensors_stay() -> None:
    program = torch.export.export(Case(in_place_of_the_state), inputs(12, torch.float32))
    assert not RerollLoops()(program).modified


def test_random_numbers_are_drawn_at_every_step() -> None:
    def noisy(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
        h = b[:, :, 0]
        for _ in steps(a):
            h = 0.5 * h + torch.rand_like(a[:, :, 0])
        return h

    program = torch.export.export(Case(noisy), inputs(12, torch.float32)).run_decompositions({})
    assert not RerollLoops()(program).modified


def test_states_used_one_by_one() -> None:
    def function(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
        h, ys, others = b.new_zeros(2, 3, 4), [], []
        for i in steps(a):
            h = a[:, :, i] * h + b[:, :, i]
            ys.append(h)
            if i in (2, 5):
                others.append(h.tanh() + i)
        return torch.stack(ys), *others

    given = inputs(12, torch.float32)
    program = rerolled(Case(function), *given)
    assert relative_error(program, Case(function), *given) < TOLERANCE
    assert operators(program)["select"] == 2


def test_other_parts_of_an_output_stay() -> None:
    """Steps that are not like the others, and what is not of the loop."""

    def function(m: Case, a: Tensor, b: Tensor, c: Tensor) -> Any:
        h, ys = b.new_zeros(2, 3, 4), [m.A.expand(2, 3, 4)]
        for i in steps(a):
            h = a[:, :, i] * h + b[:, :, i]
            ys.append(h * 2 if i == 11 else h.tanh())
        return torch.stack(ys, 1)

    given = inputs(12, torch.float32)
    program = rerolled(Case(function), *given)
    assert relative_error(program, Case(function), *given) < TOLERANCE
    found = operators(program)
    assert found["linear_scan"] == found["tanh"] == found["cat"] == 1


@pytest.mark.parametrize(("pscan", "is_rolled"), [(False, True), (True, False)])
def test_mambapy(pscan: bool, is_rolled: bool) -> None:
    """Its parallel scan is captured step by step, and grows with the logarithm of the length alone."""
    mambapy = pytest.importorskip("mambapy.mamba")
    module = mambapy.Mamba(mambapy.MambaConfig(d_model=8, n_layers=1, d_state=4, pscan=pscan))
    x = torch.randn(2, 11, 8, generator=torch.Generator().manual_seed(0))
    result = RerollLoops()(captured(module, x))
    assert result.modified is is_rolled
    assert relative_error(result.program, module, x) < TOLERANCE


_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 8, "use_cache": False}
_ATTENTION = {"intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2}
_NO_ATTENTION = {"layers_block_type": ["mamba", "mamba"], "attn_layer_period": 6, "attn_layer_offset": 4}
TRANSFORMERS: dict[str, tuple[dict[str, Any], int]] = {
    "Mamba": ({"state_size": 4}, 2),
    "FalconMamba": ({"state_size": 4}, 2),
    "Jamba": (
        {**_ATTENTION, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4, "use_mamba_kernels": False}
        | {"num_experts": 1, "num_experts_per_tok": 1, "mamba_dt_rank": 4},
        1,
    ),
    "Zamba": (
        {**_ATTENTION, **_NO_ATTENTION, "mamba_d_state": 4, "n_mamba_heads": 2, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False, "attention_hidden_size": 32, "attention_head_dim": 8},
        4,
    ),
    "RecurrentGemma": (
        {**_ATTENTION, "lru_width": 16, "block_types": ["recurrent", "recurrent"], "attention_window_size": 8},
        2,
    ),
}
"""What to configure beside `_SIZES`, and the number of scans."""


class Transformer(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(inputs_embeds=x, use_cache=False).last_hidden_state


@pytest.mark.parametrize(
    "name", [name if name == "Mamba" else pytest.param(name, marks=pytest.mark.slow) for name in TRANSFORMERS]
)
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    options, scans = TRANSFORMERS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**_SIZES, **options)
    module = Transformer(getattr(transformers, f"{name}Model")(config))
    programs = [rerolled(module, torch.randn(2, length, 16)) for length in (10, 13)]
    for program in programs:
        with torch.no_grad():  # in float32: these models convert to it inside
            error = torch.dist(program.module()(*program.example_inputs[0]), module.eval()(*program.example_inputs[0]))
        assert error < TOLERANCE
        assert operators(program)["linear_scan"] == scans
    assert len(programs[0].graph.nodes) == len(programs[1].graph.nodes)


@pytest.mark.slow
def test_transformers_mamba_2() -> None:
    """It works in chunks, with no loop."""
    transformers = pytest.importorskip("transformers")
    sizes = {"state_size": 4, "num_heads": 4, "head_dim": 8, "expand": 2, "n_groups": 1, "chunk_size": 8}
    model = transformers.Mamba2Model(transformers.Mamba2Config(**_SIZES, **sizes))
    assert_stays(Transformer(model), torch.randn(2, 20, 16))


Step = Callable[[Case, int, tuple[Tensor, ...]], Tensor]

_SLICES: tuple[Step, ...] = (
    lambda m, i, x: x[0][:, :, i],
    lambda m, i, x: x[1][:, :, i],
    lambda m, i, x: x[1][:, :, i : i + 1].squeeze(2),
    lambda m, i, x: x[0][:, :, -1 - i],
    lambda m, i, x: x[1].unbind(2)[i],
    lambda m, i, x: x[2][:, None, :, i],
    lambda m, i, x: x[2].transpose(1, 2)[:, i].unsqueeze(1),
    lambda m, i, x: x[2][0, 0][i] * m.A,
    lambda m, i, x: x[0][0, :, i],
    lambda m, i, x: m.A,
    lambda m, i, x: m.h0,
)
_FUNCTIONS: tuple[Callable[[Case, Tensor], Tensor], ...] = (
    lambda m, x: x.sigmoid(),
    lambda m, x: -x,
    lambda m, x: x @ m.w,
    lambda m, x: F.linear(x, m.w, m.h0),
    lambda m, x: F.layer_norm(x, (4,)),
    lambda m, x: x.softmax(-1),
    lambda m, x: x.mean(-1, keepdim=True).exp() * m.h0,
    lambda m, x: x.unsqueeze(-1).expand(*x.shape, 2).flatten(-2).unflatten(-1, (4, 2)).sum(-1),
    lambda m, x: torch.cat((x, m.h0.expand(x.shape)), -1).chunk(2, -1)[0],
    lambda m, x: torch.where(x > 0, x, 0.1),
    lambda m, x: x.transpose(-1, -2).contiguous().transpose(-1, -2).clamp(min=-1),
)
_PAIRS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (torch.add, torch.mul, torch.sub, torch.maximum)
_UPDATES: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    lambda h, s, v: s * h + v,
    lambda h, s, v: v + h * s,
    lambda h, s, v: h * s - v,
    lambda h, s, v: v - s * h,
    lambda h, s, v: (1 - s) * h + s * v,
    lambda h, s, v: h + s * (v - h),
    lambda h, s, v: torch.lerp(h, v.expand(h.shape), 0.25),
    lambda h, s, v: torch.lerp(v.expand(h.shape), h, s.expand(h.shape)),
    lambda h, s, v: torch.addcmul(v, s, h, value=0.5),
    lambda h, s, v: torch.addcdiv(v, h, 1 + s, value=-1),
    lambda h, s, v: torch.where(s > 0.5, 0.5 * h, v),
    lambda h, s, v: torch.rsub(h / (1 + s), v, alpha=0.5),
    lambda h, s, v: torch.add(v, h, alpha=0.5),
    lambda h, s, v: h * 0.9 + v,
    lambda h, s, v: h + v / 10,
)
_READS: tuple[Callable[[Case, Tensor, Tensor], Tensor], ...] = (
    lambda m, h, v: h,
    lambda m, h, v: h * v,
    lambda m, h, v: (h * v).sum(-1),
    lambda m, h, v: (h @ v.expand(h.shape).transpose(-1, -2)).tanh(),
    lambda m, h, v: torch.einsum("bdn,dn->bd", h, m.A),
    lambda m, h, v: F.linear(h, m.w, m.h0),
    lambda m, h, v: torch.cat((h, v.expand(h.shape)), 1),
    lambda m, h, v: F.layer_norm(h, (4,)).flatten(1),
)


def step_values() -> st.SearchStrategy[Step]:
    """Expressions of what a step has besides its state."""

    def deeper(inner: st.SearchStrategy[Step]) -> st.SearchStrategy[Step]:
        return st.one_of(
            st.builds(lambda f, x: lambda m, i, given: f(m, x(m, i, given)), st.sampled_from(_FUNCTIONS), inner),
            st.builds(
                lambda f, x, y: lambda m, i, given: f(x(m, i, given), y(m, i, given)),
                st.sampled_from(_PAIRS),
                inner,
                inner,
            ),
        )

    return st.recursive(st.sampled_from(_SLICES), deeper, max_leaves=4)


@st.composite
def loops(draw: st.DrawFn) -> Loop:
    """Any loop of one or two states, read in any way."""
    decay, value, reading = (draw(step_values()) for _ in range(3))
    updates = draw(st.lists(st.sampled_from(_UPDATES), min_size=1, max_size=2))
    read, again = draw(st.sampled_from(_READS)), draw(st.sampled_from((None, *_UPDATES)))
    initial = draw(st.sampled_from(("zeros", "learned", "number", "first")))
    backward, read_first = draw(st.booleans()), draw(st.booleans())
    joined, axis = draw(st.sampled_from(("stack", "cat", "insert", "assign", "grow"))), draw(st.integers(0, 2))

    def function(m: Case, *given: Tensor) -> Any:
        whole = given[1].new_zeros(2, 3, 4)
        h: Any = {"zeros": whole, "learned": m.h0 * 1, "number": 0, "first": None}[initial]
        other, ys = whole, []
        order = reversed(steps(given[0])) if backward else steps(given[0])
        for i in order:
            s, v = decay(m, i, given).sigmoid(), value(m, i, given).tanh()
            before = h
            if h is None:
                h = v.expand(2, 3, 4)
            else:
                for update in updates:
                    h = update(h if isinstance(h, Tensor) else whole, s, v)
            h = h.expand(2, 3, 4)
            if again is not None:
                other = again(other, s, h)
            state = before if read_first and isinstance(before, Tensor) and before.dim() == 3 else h
            ys.append(read(m, state + other, reading(m, i, given).tanh()))
        return join(ys, joined, axis), h, other

    return function


def join(ys: list[Tensor], how: str, axis: int) -> Tensor:
    if how == "insert":
        ys = ys[::-1]
    if how in ("stack", "insert"):
        return torch.stack(ys, axis)
    if how == "cat":
        return torch.cat([y.unsqueeze(axis) for y in ys], axis)
    if how == "grow":
        whole = ys[0].unsqueeze(axis)
        for y in ys[1:]:
            whole = torch.cat((whole, y.unsqueeze(axis)), axis)
        return whole
    whole = ys[0].new_zeros(*ys[0].shape[:axis], len(ys), *ys[0].shape[axis:])
    for i, y in enumerate(ys):
        whole.select(axis, i).copy_(y)
    return whole


def _check(function: Loop) -> None:
    module = Case(function).double()
    sizes = []
    for length in (12, 14):
        given = inputs(length)
        program = captured(module, *given)
        result = RerollLoops()(program)
        assert result.modified
        assert relative_error(result.program, module, *given) < RANDOM_TOLERANCE
        sizes.append(len(result.program.graph.nodes))
    assert sizes[0] == sizes[1]


_settings = hypothesis.settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],  # a smaller example takes minutes to find
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.mark.usefixtures("float64")
@hypothesis.settings(_settings, max_examples=8)
@hypothesis.given(loops())
def test_random_loops(function: Loop) -> None:
    _check(function)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.timeout(1800)
@hypothesis.settings(_settings, max_examples=60)
@hypothesis.given(loops())
def test_many_random_loops(function: Loop) -> None:
    _check(function)
