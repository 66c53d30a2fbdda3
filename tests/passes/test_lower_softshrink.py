import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import assert_untouched, operators, rewritten
from torch import nn

from mobilemix.passes.lower_softshrink import LowerSoftshrink


@given(threshold=st.floats(0, 2), seed=st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_equals_softshrink_bit_for_bit_at_the_ends(threshold: float, seed: int) -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    x[0, :4] = torch.tensor([threshold, -threshold, 0.0, 1e30])
    program = rewritten(LowerSoftshrink(), nn.Softshrink(threshold), x)
    assert operators(program) == {"clamp": 1, "sub": 1}
    expected = torch.nn.functional.softshrink(x, threshold)
    assert torch.equal(program.module()(x), expected)


def test_hard_shrinkage_is_another_function() -> None:
    assert_untouched(LowerSoftshrink(), nn.Hardshrink(), torch.randn(3))
