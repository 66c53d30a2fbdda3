"""Unrolled loops over time. Every loop runs over axis 2 of a and b (2, 3, L, 4) and c (2, 4, L)."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from passes_checks import TOLERANCE, operators, relative_error
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from mobilemix.capture import capture
from mobilemix.passes.remove_no_ops import RemoveNoOps
from mobilemix.passes.reroll_loops import RerollLoops

FLOAT64_TOLERANCE = 1e-13
"""Of a sum in another order."""

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
