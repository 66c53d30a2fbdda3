import itertools
import math

import pytest

from mobilemix.passes.complex_to_real import costs
from mobilemix.passes.complex_to_real.dft import Transform

LENGTHS = (
    1,
    2,
    7,
    8,
    13,
    14,
    16,
    31,
    32,
    48,
    56,
    64,
    96,
    97,
    128,
    224,
    256,
    384,
    509,
    512,
    1000,
    1024,
    2048,
    4096,
    16384,
)
OUTER = (1, 3, 64, 384, 4096)
INNER = (1, 5, 17, 33, 65, 129, 1024)


def transforms(n: int) -> tuple[Transform, ...]:
    half = n // 2 + 1
    return (
        Transform("real", n, n, half, False, -1, 1.0),
        Transform("real", n, n, n, False, -1, 1.0),
        Transform("complex", n, n, n, False, -1, 1.0),
        Transform("complex", n, n, n, True, -1, 1.0),
        Transform("half", n, half, n, True, 1, 1 / n),
    )


@pytest.mark.parametrize("n", LENGTHS)
def test_no_form_costs_more_than_a_dense_matrix(n: int) -> None:
    for transform, outer, inner in itertools.product(transforms(n), OUTER, INNER):
        form = costs.best(transform, outer, inner)
        plain = costs.dense(transform.inputs, transform.outputs, outer, inner)
        inside = costs.Form((n,), False, (costs.left(outer, transform.outputs, transform.inputs, inner),))
        assert form.cost <= plain.cost
        assert inner == 1 or plain.cost <= inside.cost, "nor than the matrix from the left, without a transposition"
        assert len(form.factors) == 1 or math.prod(form.factors) == n


@pytest.mark.parametrize(("n", "stages"), [(8, 1), (14, 1), (28, 1), (97, 1), (509, 1), (128, 3), (4096, 4)])
def test_long_composite_lengths_have_stages(n: int, stages: int) -> None:
    assert len(costs.best(transforms(n)[2], 64, 65).factors) == stages


def test_few_numbers_behind_an_axis_are_brought_before_it() -> None:
    transform = transforms(28)[2]
    assert costs.best(transform, 192, 5).around
    assert not costs.best(transform, 192, 200).around
    assert not costs.best(transform, 1, 5).around, "there is nothing to bring together"


def test_more_work_costs_more() -> None:
    sizes = {costs.left: (3, 20, 30, 40), costs.right: (20, 30, 40), costs.transpose: (30, 4), costs.gather: (30, 4)}
    for operator, given in sizes.items():
        once = costs.Form((), False, (operator(*given),)).cost
        assert once > 0
        for position, size in enumerate(given):
            larger = (*given[:position], 4 * size, *given[position + 1 :])
            assert costs.Form((), False, (operator(*larger),)).cost > once
