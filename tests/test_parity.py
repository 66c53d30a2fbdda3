import numpy as np
import pytest
import torch
from torch import nn

from mobilemix.parity import TIERS, Tolerance, compare, cosine, first_departure, noise, reference, relative_l2
from mobilemix.signature import Input
from mobilemix.targets.base import Check


class Mixed(nn.Module):
    """Real and complex parameters, two outputs, one of them complex."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.filter = nn.Parameter(torch.randn(4, dtype=torch.complex64))

    def forward(self, x):
        y = self.linear(x)
        return {"real": y, "complex": y * self.filter}


def test_the_reference_is_in_float64_and_leaves_the_module_alone():
    module = Mixed()
    (sample,) = noise([Input("x", (2, 6))], 1)
    answer = reference(module, [sample])
    assert answer.dtype == "float64"
    real, complex_ = sorted(answer.outputs[0], key=lambda array: array.ndim)
    assert real.dtype == complex_.dtype == np.float64
    assert module.linear.weight.dtype == torch.float32
    exact = sample["x"].astype(np.float64) @ module.linear.weight.detach().numpy().astype(np.float64).T
    exact += module.linear.bias.detach().numpy()
    assert relative_l2(real, exact) < 1e-15
    expected = exact * module.filter.detach().numpy().astype(np.complex128)
    assert relative_l2(complex_, np.stack([expected.real, expected.imag], -1)) < 1e-15


def test_code_that_insists_on_float32_is_compared_with_in_float32():
    class Stubborn(nn.Module):
        def forward(self, x):
            return x.float() @ torch.ones(6, 2, dtype=torch.float32) + torch.zeros(2, dtype=torch.float64).float()

    class Mixing(nn.Module):
        def forward(self, x):
            return x @ torch.ones(6, 2, dtype=torch.float32)

    sample = noise([Input("x", (2, 6))], 1)
    assert reference(Mixing(), sample).dtype == "float32"
    assert reference(Stubborn(), sample).outputs[0][0].dtype == np.float32


def test_new_tensors_of_the_forward_are_float64_too():
    class Third(nn.Module):
        def forward(self, x):
            return x * torch.full((1,), 1 / 3)

    (sample,) = noise([Input("x", (5,))], 1)
    (answer,) = reference(Third(), [sample]).outputs[0]
    np.testing.assert_array_equal(answer, sample["x"].astype(np.float64) * (1 / 3))


def test_agreement_takes_the_worst_sample_and_output():
    one, other = np.array([[1.0, 0.0]]), np.array([[0.0, 2.0]])
    wrong = np.array([[1.1, 0.0]])
    agreement = compare([[one, other], [wrong, other]], [[one, other], [one, other]])
    assert agreement.samples == 2
    assert agreement.max_abs == pytest.approx(0.1)
    assert agreement.mean_abs == pytest.approx(0.1 / 8)
    assert agreement.relative_l2 == pytest.approx(0.1)
    assert agreement.cosine == pytest.approx(1)
    assert agreement.top1 == 1


def test_top1_counts_the_first_output_only():
    right, wrong = [np.array([1.0, 0.0])], [np.array([0.0, 1.0])]
    assert compare([right, wrong], [right, right]).top1 == 0.5


@pytest.mark.parametrize("tier", TIERS)
def test_not_a_number_is_never_within_a_tolerance(tier):
    good, bad = [np.ones(3)], [np.array([1.0, np.nan, 1.0])]
    assert compare([good], [good]).within(TIERS[tier])
    assert not compare([bad], [good]).within(TIERS[tier])
    assert not compare([good, bad], [good, good]).within(TIERS[tier])
    assert not compare([bad, good], [good, good]).within(TIERS[tier])


def test_zero_references_are_compared_absolutely():
    zeros = np.zeros(3)
    assert relative_l2(zeros, zeros) == 0
    assert cosine(zeros, zeros) == 1
    assert relative_l2(np.ones(3), zeros) > 1
    assert cosine(np.ones(3), zeros) == 0


def test_outputs_of_another_number_or_shape_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        compare([[np.ones(2)]], [[np.ones(2), np.ones(2)]])
    with pytest.raises(ValueError, match="broadcast"):
        compare([[np.ones(2)]], [[np.ones(3)]])


def test_noise_is_the_same_every_time_and_differs_between_samples():
    inputs = [Input("a", (2, 3)), Input("b", (4,))]
    first, again = noise(inputs, 2), noise(inputs, 2)
    np.testing.assert_array_equal(first[1]["b"], again[1]["b"])
    assert not np.array_equal(first[0]["a"], first[1]["a"])
    assert first[0]["a"].dtype == np.float32


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)

    def forward(self, x):
        return self.second(self.first(x).relu())


class Faulty:
    """A runner of the chain's own values, of which those from `fault` on are wrong."""

    def __init__(self, module, fault):
        self.module, self.fault = module, fault

    def run(self, inputs):
        raise AssertionError("the bisect asks for values")

    def values(self, inputs):
        x = torch.from_numpy(inputs["x"])
        hidden = self.module.first(x)
        results = {
            "linear": hidden,
            "relu_cast_fp16": hidden.relu(),
            "unknown": x,
            "linear_1": self.module.second(hidden.relu()),
        }
        broken = False
        for name, value in results.items():
            broken = broken or name == self.fault
            yield name, value.detach().numpy() * (1.5 if broken else 1.0)


@pytest.mark.parametrize(("fault", "where"), [("linear", "first"), ("relu_cast_fp16", ""), ("linear_1", "second")])
def test_the_first_wrong_value_is_named_with_its_module(fault, where):
    module = Chain().eval()
    program = torch.export.export(module, (torch.zeros(2, 4),), strict=False)
    (sample,) = noise([Input("x", (2, 4))], 1)
    found = first_departure(program, Faulty(module, fault), sample, TIERS["fp32"].relative_l2)
    assert found is not None
    assert found.startswith(f"{fault}: relative error 5.0e-01")
    assert where in found


def test_nothing_departs_where_everything_agrees():
    module = Chain().eval()
    program = torch.export.export(module, (torch.zeros(2, 4),), strict=False)
    (sample,) = noise([Input("x", (2, 4))], 1)
    assert first_departure(program, Faulty(module, None), sample, TIERS["fp32"].relative_l2) is None


def test_a_check_that_could_not_run_here_does_not_fail_the_verdict():
    from mobilemix.parity import Parity

    good = compare([[np.ones(3)]], [[np.ones(3)]])
    tolerance = Tolerance(1e-5, 0.999)

    def passed(*checks: Check) -> bool:
        return Parity({"noise": good}, "float64", tolerance, checks, None).passed

    assert passed()
    assert passed(Check("native", None, "not run: needs macOS"))
    assert not passed(Check("native", True, ""), Check("range", False, "overflow"))
