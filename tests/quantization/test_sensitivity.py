"""On a chain of matrix products of which each can be rounded to a grid of its own."""

from collections.abc import Collection, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mobilemix.quantization.sensitivity import EXACT, WATCHED, Layer, Run, distance, sensitivities, sqnr
from mobilemix.targets.base import Inputs

SAMPLES = 20
HALF_A_DB = 0.5


class Chain:
    """y = … W₂ · tanh(W₁ x), with outputs of layer i in steps of `steps[i]` where it is quantised."""

    def __init__(self, steps: Sequence[float]) -> None:
        random = np.random.default_rng(0)
        self.steps = steps
        self.weights = [random.standard_normal((6, 6)) for _ in steps]
        self.layers = [
            Layer(f"net.{index}/out_{index}", f"net.{index}", f"out_{index}", 36, 144) for index in range(len(steps))
        ]
        self.asked: list[frozenset[str]] = []

    def reference(self, watched: Sequence[str] = ()) -> Run:
        return self.runner([layer.name for layer in self.layers], watched)

    def runner(self, float_layers: Collection[str], watched: Sequence[str] = ()) -> Run:
        self.asked.append(frozenset(float_layers))

        def run(inputs: Inputs) -> dict[str, np.ndarray]:
            x, values = inputs["x"], {}
            for layer, weight, step in zip(self.layers, self.weights, self.steps, strict=True):
                x = x @ weight
                x = x if layer.name in float_layers or not step else np.rint(x / step) * step
                values[layer.output] = x
                x = np.tanh(x)
            return {"y": x, **{name: values[name] for name in watched}}

        return run


@pytest.fixture
def samples():
    random = np.random.default_rng(1)
    return [{"x": random.standard_normal((1, 6))} for _ in range(SAMPLES)]


def test_each_layer_is_quantised_alone(samples):
    chain, told = Chain([0.0, 0.5, 0.01]), []
    sensitivities(chain, samples, told.append)
    names = {layer.name for layer in chain.layers}
    assert sorted(len(names - kept) for kept in chain.asked) == [0, 0, 1, 1, 1]
    assert sorted(told) == [f"sensitivity {index + 1}/3 · net.{index}/out_{index}" for index in range(3)]


def test_noise_and_drift_are_those_of_the_layer(samples):
    exact, coarse, fine = sensitivities(Chain([0.0, 0.5, 0.01]), samples, lambda _: None)
    assert exact.sqnr == EXACT
    assert exact.drift.relative_l2 == 0
    assert exact.drift.top1 == 1
    assert coarse.drift.relative_l2 > 10 * fine.drift.relative_l2 > 0
    assert coarse.drift.cosine < fine.drift.cosine < 1
    # Rounding to steps of d adds noise of d² / 12: a hundredth of a step of another adds 20·log₁₀(50) dB.
    assert 30 < fine.sqnr - coarse.sqnr < 40


def test_outputs_of_layers_are_compared_on_few_samples_of_all(samples):
    chain = Chain([0.5])
    (found,) = sensitivities(chain, samples, lambda _: None)
    few = samples[:: -(-SAMPLES // WATCHED)]
    assert len(few) <= WATCHED
    values = [chain.runner([], ["out_0"])(sample)["out_0"] for sample in few]
    assert found.sqnr == sqnr(values, [chain.reference(["out_0"])(sample)["out_0"] for sample in few])
    outputs = [[chain.runner([])(sample)["y"]] for sample in samples]
    assert found.drift == distance(outputs, [[chain.reference()(sample)["y"]] for sample in samples])


def test_sqnr_of_uniform_noise():
    signal = np.random.default_rng(2).uniform(-1, 1, 100_000)
    step = 2 / 256
    noise = np.rint(signal / step) * step
    assert abs(sqnr([noise], [signal]) - 6.02 * 8) < HALF_A_DB


@given(arrays.arrays(np.float64, (2, 3), elements=st.floats(-1e3, 1e3)))
def test_what_is_the_same_has_no_distance(array):
    found = distance([[array[:1]], [array[1:]]], [[array[:1]], [array[1:]]])
    assert (found.relative_l2, found.top1) == (0, 1)
    assert found.cosine == pytest.approx(1)
    assert sqnr([array], [array]) == EXACT


def test_a_value_that_is_lost_altogether():
    assert sqnr([np.zeros(3)], [np.ones(3)]) == 0
    assert sqnr([np.ones(3)], [np.zeros(3)]) < -100


def test_top1_looks_at_the_first_output():
    expected = [[np.array([[0.0, 1.0]]), np.array([[3.0]])], [np.array([[1.0, 0.0]]), np.array([[3.0]])]]
    outputs = [[np.array([[1.0, 0.0]]), np.array([[3.0]])], [np.array([[2.0, 0.0]]), np.array([[3.0]])]]
    assert distance(outputs, expected).top1 == 0.5
