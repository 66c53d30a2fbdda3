import itertools
from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilemix.errors import InputError, UnknownNameError
from mobilemix.quantization.search import TRIALS, Judge, order, savings, search
from mobilemix.quantization.sensitivity import Distance, Layer, Sensitivity


def layer(name: str, **fields: object) -> Layer:
    return Layer(**{"name": name, "module": "", "output": name, "multiply_adds": 1, "weight_bytes": 1, **fields})


def sensitivity(name: str, drift: float) -> Sensitivity:
    return Sensitivity(layer(name), 30.0, Distance(drift, 1.0, 1.0))


class Sums:
    """A model whose drop is the sum of what its quantised layers cost."""

    def __init__(self, costs: dict[str, float]) -> None:
        self.costs = costs
        self.runs = 0

    def __call__(self, kept: Collection[str]) -> tuple[float, float]:
        self.runs += 1
        drop = sum(cost for name, cost in self.costs.items() if name not in kept)
        return 1 - drop, drop


COSTS = {"a": 0.001, "b": 0.02, "c": 0.0, "d": 0.003, "e": 0.1}
SAVED = dict.fromkeys(COSTS, 1.0)


def test_nothing_is_left_in_float_where_nothing_has_to():
    found = search("ebdac", SAVED, Sums(COSTS), max_drop=0.2)
    assert found.chosen.kept == ()
    assert len(found.trials) == 1


def test_the_fewest_layers_within_the_limit():
    found = search("ebdac", SAVED, Sums(COSTS), max_drop=0.005)
    assert found.chosen.kept == ("b", "e")
    assert found.chosen.drop == pytest.approx(0.004)
    assert found.chosen.score == pytest.approx(0.996)
    assert found.trials[0].kept == ()


def test_layers_that_were_kept_for_others_are_given_back():
    found = search("cabed", SAVED, Sums(COSTS), max_drop=0.005)  # the ranking is wrong about c and a
    assert found.chosen.kept == ("b", "e")


def test_those_that_save_most_are_given_back_first():
    costs = {"b": 0.003, "c": 0.003, "x": 0.01, "d": 0.0}
    found = search("bcxd", {"b": 1.0, "c": 9.0, "x": 1.0, "d": 1.0}, Sums(costs), max_drop=0.004)
    assert found.chosen.kept == ("b", "x")


def test_no_choice_is_tried_twice():
    judge = Sums(COSTS)
    found = search("cabed", SAVED, judge, max_drop=0.005)
    assert len({trial.kept for trial in found.trials}) == len(found.trials) == judge.runs


def test_a_limit_that_no_choice_holds():
    with pytest.raises(InputError, match=r"no choice of layers loses 0\.50% or less; the best loses 1\.00%"):
        search("ab", {"a": 1.0, "b": 1.0}, Sums({"a": 0.01, "b": 0.01}), max_drop=0.005)


@given(st.lists(st.floats(0, 0.02), min_size=2, max_size=40), st.floats(0.001, 0.05))
def test_the_choice_is_within_the_limit_and_no_trial_within_it_is_cheaper(costs, max_drop):
    named = {f"layer {index:02}": cost for index, cost in enumerate(costs)}
    saved = {name: 1.0 + index % 3 for index, name in enumerate(named)}
    judge = Sums(named)
    ranked = sorted(named, key=lambda name: named[name] / saved[name], reverse=True)
    try:
        found = search(ranked, saved, judge, max_drop)
    except InputError:
        assert min(named.values()) > max_drop or judge.runs == TRIALS
        return
    lost = {trial: sum(saved[name] for name in trial.kept) for trial in found.trials if trial.drop <= max_drop}
    assert found.chosen in lost
    assert lost[found.chosen] == min(lost.values())
    assert judge.runs == len(found.trials) <= TRIALS


def test_an_exhaustive_search_of_few_layers_finds_nothing_much_better():
    random = np.random.default_rng(0)
    for _ in range(20):
        costs = {name: float(cost) for name, cost in zip("abcdefgh", random.uniform(0, 0.01, 8), strict=True)}
        saved = {name: float(value) for name, value in zip("abcdefgh", random.uniform(1, 3, 8), strict=True)}
        judge = Sums(costs)
        ranked = sorted(costs, key=lambda name: costs[name] / saved[name], reverse=True)
        found = search(ranked, saved, judge, max_drop=0.01)
        choices = (set(kept) for count in range(9) for kept in itertools.combinations(costs, count))
        best = min(sum(saved[name] for name in kept) for kept in choices if judge(kept)[1] <= 0.01)
        assert sum(saved[name] for name in found.chosen.kept) <= best + max(saved.values())


def test_the_order_is_by_energy_of_the_drift_for_each_unit_saved():
    found = [sensitivity("a", 0.1), sensitivity("b", 0.2), sensitivity("c", 0.01), sensitivity("free", 0.001)]
    assert order(found, {"a": 1.0, "b": 5.0, "c": 1.0, "free": 0.0}) == ["free", "a", "b", "c"]


def test_savings_by_objective():
    timed = [layer("a", seconds=0.5, weight_bytes=8), layer("b", seconds=0.25, weight_bytes=16)]
    assert savings(timed, "latency") == {"a": 0.5, "b": 0.25}
    assert savings(timed, "size") == {"a": 8, "b": 16}
    assert savings([*timed, layer("c", multiply_adds=7)], "latency") == {"a": 1, "b": 1, "c": 7}
    with pytest.raises(UnknownNameError, match="did you mean 'latency'"):
        savings(timed, "latncy")


def classifier(*answers: int):
    outputs = {index: np.eye(3)[[answer]] for index, answer in enumerate(answers)}
    return lambda inputs: {"logits": outputs[int(inputs["x"])]}


SAMPLES = [{"x": np.array(index)} for index in range(4)]


def test_labels_judge_by_right_answers():
    judge = Judge.of(classifier(0, 1, 2, 0), SAMPLES, labels=[0, 1, 2, 2])
    assert (judge.measure, judge.reference) == ("top-1", 0.75)
    assert judge.score(classifier(0, 1, 2, 2)) == 1
    assert judge.score(classifier(1, 2, 0, 2)) == 0.25


def test_without_labels_the_float_model_is_right():
    judge = Judge.of(classifier(0, 1, 2, 0), SAMPLES, labels=None)
    assert (judge.measure, judge.reference) == ("top-1 agreement", 1)
    assert judge.score(classifier(0, 1, 2, 2)) == 0.75


def test_other_models_are_judged_by_the_cosine():
    map_of = lambda scale: lambda inputs: {"map": np.array([[[1.0, scale]]])}  # noqa: E731
    judge = Judge.of(map_of(1.0), SAMPLES, labels=None)
    assert judge.measure == "cosine"
    assert judge.reference == pytest.approx(1)
    assert judge.score(map_of(0.0)) == pytest.approx(np.sqrt(0.5))
