import numpy as np
import pytest
import quantization_chain
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from quantization_chain import Chain

from mobilemix.quantization.sensitivity import EXACT, WATCHED, distance, sensitivities, sqnr

SAMPLES = 20
HALF_A_DB = 0.5


@pytest.fixture
def samples():
    return quantization_chain.samples(SAMPLES)


def test_each_layer_is_quantised_alone(samples):
    chain, told = Chain([0.0, 0.5, 0.01]), []
    sensitivities(chain, samples, told.append)
    names = {layer.name for layer in chain.layers}
    assert [len(names - kept) for kept in chain.asked] == [1, 1, 1]
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
