import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mobilemix.passes.complex_to_real import costs, dft, mixed_radix
from mobilemix.passes.complex_to_real.dft import Transform

EXACT = 1e-13
LARGEST = 96


def _factors(draw: st.DrawFn) -> tuple[int, ...]:
    factors = tuple(draw(st.lists(st.integers(2, 12), min_size=2, max_size=4)))
    while math.prod(factors) > LARGEST and len(factors) > 2:
        factors = factors[1:]
    return factors


@st.composite
def transforms(draw: st.DrawFn) -> tuple[Transform, tuple[int, ...]]:
    factors = _factors(draw)
    n = math.prod(factors)
    takes = draw(st.sampled_from(["real", "complex", "half"]))
    size = draw(st.sampled_from([n, n // 2 + 1])) if takes == "real" else n
    signal = draw(st.sampled_from([n, n // 2 + 1]) | st.integers(1, n + 5))
    one_part = takes == "half" or draw(st.booleans())
    scale = draw(st.sampled_from([1.0, n**-0.5, 1 / n]))
    return Transform(takes, n, signal, size, one_part, draw(st.sampled_from([-1, 1])), scale), factors


def _apply(transform: Transform, factors: tuple[int, ...], x: Tensor, before: bool, behind: bool) -> Tensor:
    """What the network makes of (inputs, I), with the parts interleaved before and behind it as asked."""
    parts, inner = x.shape[0] // transform.signal, x.shape[1]
    if before:
        x = x.reshape(parts, -1, inner).transpose(0, 1).reshape(x.shape)
    network = mixed_radix.network(transform, factors, before, behind)
    if network.transposed:
        x = x[network.order]
    else:
        x = x.reshape(parts, -1, inner)[:, : network.taken]
        x = torch.nn.functional.pad(x, (0, 0, 0, network.padded - network.taken)).reshape(-1, inner)
    for stage in network.stages:
        x = (stage @ x.reshape(len(stage), stage.shape[2], -1)).reshape(-1, inner)
    x = x if network.transposed else x[network.order]
    return x.reshape(-1, 2, inner).transpose(0, 1).reshape(x.shape) if behind else x


def check(case: tuple[Transform, tuple[int, ...]], before: bool, behind: bool, seed: int) -> None:
    transform, factors = case
    x = torch.randn(transform.inputs, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    before &= transform.takes != "real"
    behind &= not transform.one_part and not mixed_radix.is_transposed(transform, before)
    expected = dft.dense(transform) @ x
    found = _apply(transform, factors, x, before, behind)
    assert (found - expected).norm() <= EXACT * max(1.0, float(expected.norm()))


@given(transforms(), st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_networks_are_their_dense_matrices(
    case: tuple[Transform, tuple[int, ...]], before: bool, behind: bool, seed: int
) -> None:
    check(case, before, behind, seed)


@pytest.mark.slow
@given(transforms(), st.booleans(), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=4000, deadline=None)
def test_many_networks_are_their_dense_matrices(
    case: tuple[Transform, tuple[int, ...]], before: bool, behind: bool, seed: int
) -> None:
    check(case, before, behind, seed)


def test_a_network_without_its_phases_would_be_seen() -> None:
    transform = Transform("complex", 12, 12, 12, False, -1, 1.0)
    stages = mixed_radix.network(transform, (3, 4), False, False).stages
    assert len(stages[1]) == 3
    assert not torch.equal(stages[1][0], stages[1][1])


@pytest.mark.parametrize("n", [1024, 4096, 16384])
def test_matrices_of_long_transforms_stay_small(n: int) -> None:
    for takes, size in (("real", n // 2 + 1), ("complex", n), ("half", n)):
        transform = Transform(takes, n, n if takes != "half" else n // 2 + 1, size, takes == "half", -1, 1.0)
        form = costs.best(transform, 64, 1)
        stages = mixed_radix.network(transform, form.factors, False, False).stages
        assert sum(stage.numel() for stage in stages) < n**2 / 8


def test_scale_is_spread_over_the_stages() -> None:
    """No stage alone makes numbers that float16 cannot hold."""
    transform = Transform("complex", 4096, 4096, 4096, False, 1, 1 / 4096)
    for stage in mixed_radix.network(transform, (16, 16, 16), False, False).stages:
        assert float(stage.abs().max()) == pytest.approx(1 / 16)
