"""Drifts against what rounding really does, on maps whose Jacobian is known and on packages with one value rounded."""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import coreml_compressible
import numpy as np
import pytest
import torch
from coreml_lowered import FP32
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mobilemix.parity import relative_l2
from mobilemix.quantization.affine import grid_between
from mobilemix.quantization.drift import HELD, MOST, SAMPLES, Drift, Evaluate, Probe, drifts, unheld
from mobilemix.targets.base import Inputs
from mobilemix.targets.coreml.compress import simulated
from mobilemix.targets.coreml.convert import convert
from mobilemix.targets.coreml.layers import layers
from mobilemix.targets.coreml.package import read_package
from mobilemix.targets.coreml.plan import Plan, Rounded
from mobilemix.targets.coreml.target import PackageRunner

STEP = 0.05
ESTIMATE = 0.4
"""Relative tolerance of a root of the mean of `SAMPLES` squares of normal numbers: three standard deviations."""
UNEVEN = 0.6
"""The same where some of the samples make most of the mean, and where rounding is too coarse for the first order."""


def rounded(x: Tensor, step: float = STEP) -> Tensor:
    return (x.detach() / step).round() * step


def samples(size: int = 64, count: int = SAMPLES) -> list[Inputs]:
    generator = np.random.default_rng(0)
    return [{"x": generator.standard_normal(size, np.float32)} for _ in range(count)]


def expected(inputs: Sequence[Inputs], function: Callable[[Tensor], Tensor]) -> float:
    """Root mean square, over samples, of the relative distance that rounding makes."""
    pairs = [(function(rounded(x)), function(x)) for x in (torch.from_numpy(each["x"]) for each in inputs)]
    return float(np.sqrt(np.mean([float((a - b).norm() / b.norm()) ** 2 for a, b in pairs])))


def linear(sizes: Sequence[int]) -> Evaluate:
    """A chain of random maps, each of whose inputs is rounded under the name of its place."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, columns, generator=generator) for columns, rows in itertools.pairwise(sizes)]

    def evaluate(sample: Inputs, probe: Probe) -> list[Tensor]:
        x = torch.from_numpy(sample["x"])
        for place, weight in enumerate(weights):
            x = weight @ probe.round(str(place), x, rounded(x, STEP * float(x.detach().std())))
        return [x]

    return evaluate


def test_of_a_linear_map_it_is_what_rounding_does() -> None:
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))

    def evaluate(sample: Inputs, probe: Probe) -> list[Tensor]:
        x = torch.from_numpy(sample["x"])
        return [weight @ probe.round("x", x, rounded(x))]

    found = drifts(evaluate, samples())
    assert found.keys() == {"x"}
    assert found["x"].outputs == pytest.approx(expected(samples(), lambda x: weight @ x), rel=ESTIMATE)
    assert found["x"].value == pytest.approx(expected(samples(), lambda x: x), rel=5e-2)
    assert found == drifts(evaluate, samples())


def test_errors_go_through_later_roundings() -> None:
    found = drifts(linear([64, 48, 32, 5]), samples())
    assert set(found) == {"0", "1", "2"}
    uniform = STEP / math.sqrt(12)  # of numbers whose standard deviation is one
    for drift in found.values():
        assert uniform / 2 < drift.outputs < 2 * uniform
        assert drift.value == pytest.approx(uniform, rel=0.1)


def test_places_of_one_name_err_together() -> None:
    """x − x is 0 however it is rounded; two names know nothing of each other."""

    def evaluate(names: Sequence[str]) -> Evaluate:
        def run(sample: Inputs, probe: Probe) -> list[Tensor]:
            x = torch.from_numpy(sample["x"])
            one, other = (probe.round(name, x, rounded(x)) for name in names)
            return [one - other + x.clone()]

        return run

    together, apart = drifts(evaluate("aa"), samples()), drifts(evaluate("ab"), samples())
    assert together["a"].outputs < 1e-6 < 1e-3 < apart["a"].outputs == pytest.approx(apart["b"].outputs)
    assert together["a"].value == pytest.approx(apart["a"].value)


def test_outputs_count_alike_whatever_their_size() -> None:
    def evaluate(sample: Inputs, probe: Probe) -> list[Tensor]:
        x = torch.from_numpy(sample["x"])
        read = probe.round("x", x, rounded(x))
        return [1e4 * read[:32], read[32:]]

    found = drifts(evaluate, samples())
    assert found["x"].outputs == pytest.approx(expected(samples(), lambda x: x), rel=ESTIMATE)


def test_what_no_output_reads_does_not_drift() -> None:
    def evaluate(sample: Inputs, probe: Probe) -> list[Tensor]:
        x = torch.from_numpy(sample["x"])
        probe.round("unread", x, rounded(x))
        return [2 * probe.round("read", x, x)]

    found = drifts(evaluate, samples())
    assert [found[name].outputs for name in ("unread", "read")] == [0, 0]
    assert found["unread"].value > 0 == found["read"].value
    assert drifts(lambda sample, _: [torch.from_numpy(sample["x"])], samples()) == {}


numbers = st.one_of(st.floats(0, 1), st.sampled_from([math.nan, math.inf]))
values = st.builds(Drift, outputs=numbers, value=st.one_of(st.floats(0, 1), st.just(math.nan)))


@given(st.dictionaries(st.text(max_size=3), values, max_size=8), st.floats(1e-3, 0.5))
def test_as_few_as_leave_the_others_little_stay_in_float(found: dict[str, Drift], most: float) -> None:
    lost = unheld(found, most)
    assert lost <= {name for name, each in found.items() if not each.value <= HELD}
    kept = {name: each for name, each in found.items() if name not in lost}
    rest = math.hypot(*(each.outputs for each in kept.values()))
    assert rest <= most * (1 + 1e-9) or all(each.value <= HELD for each in kept.values())
    if lost:
        back = min((found[name].outputs for name in lost), key=lambda each: each if math.isfinite(each) else math.inf)
        assert not math.isfinite(back) or not math.hypot(rest, back) <= most * (1 - 1e-9)
        assert not math.isfinite(back) or all(each.outputs <= back for each in kept.values() if each.value > HELD)


def test_of_a_package_it_is_what_rounding_one_value_does(tmp_path: Path) -> None:
    """To first order: each value alone, executed with and without."""
    lowered, path = coreml_compressible.lowered(), tmp_path / "float.mlpackage"
    convert(lowered, FP32, path)
    package = read_package(path)
    runner, inputs = PackageRunner(package), coreml_compressible.samples(SAMPLES)
    readers = {layer.value: layer.operation.outputs[0].name for layer in layers(package, lowered) if layer.value}
    plans = {}
    for name, reader in readers.items():
        values = [dict(runner.values(each)).get(name, each.get("image")) for each in inputs]
        assert all(value is not None for value in values)
        low, high = (float(end(list(map(end, values)))) for end in (np.min, np.max))
        grid = grid_between(low, high, bits=5, symmetric=False)
        plans[name] = Rounded(grid, frozenset({reader}))
    together = runner.drifts(plans, inputs)
    assert together.keys() == plans.keys()
    assert len(plans) > 2
    for name, one in plans.items():
        alone = runner.drifts({name: one}, inputs)[name].outputs
        measured = _measured(runner, {name: one}, inputs)
        assert alone == pytest.approx(measured, rel=UNEVEN), name
        assert together[name].outputs == pytest.approx(measured, rel=UNEVEN), name
        assert measured > MOST / 100


def _measured(runner: PackageRunner, values: dict[str, Rounded], inputs: Sequence[Inputs]) -> float:
    changed = PackageRunner(simulated(runner.package, Plan({}, values)))
    squares = []
    for each in inputs:
        (found,), (wanted,) = (list(run.run(each).values()) for run in (changed, runner))
        squares.append(relative_l2(found, wanted) ** 2)
    return float(np.sqrt(np.mean(squares)))
