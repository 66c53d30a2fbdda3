import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from coreml_lowered import FP16, lowered, samples
from coreml_packages import seeded
from torch import nn

from mobilemix.targets.base import LARGEST_HALF, Check
from mobilemix.targets.coreml import CoreMLTarget
from mobilemix.targets.coreml.audit import SMALLEST_NORMAL, audit
from mobilemix.targets.coreml.package import Package, read_package

TINY = SMALLEST_NORMAL / 4


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A package, for the tests that bring their own values."""
    path = tmp_path_factory.mktemp("package") / "sigmoid.mlpackage"
    CoreMLTarget().compile(lowered(nn.Sigmoid()), FP16, path)
    return read_package(path)


def test_ranges_over_all_samples(empty: Package) -> None:
    runs = [
        [("a", np.array([3.0, -4.0, 0.0])), ("b", np.array([1.0])), ("other", np.array([1e9]))],
        [("a", np.array([TINY, -TINY, 0.0])), ("b", np.array([-70000.0]))],
    ]
    a, b = audit(empty, runs, {"a", "b"}).ranges
    assert (a.name, a.largest, a.subnormal, a.overflows) == ("a", 4.0, 0.5, False)
    assert a.lost == pytest.approx((2 * TINY**2 / 25) ** 0.5, rel=1e-6)
    assert (b.largest, b.subnormal, b.lost, b.overflows) == (70000.0, 0.0, 0.0, True)


@pytest.mark.parametrize("value", [np.nan, np.nextafter(LARGEST_HALF, np.inf), -1e30])
@pytest.mark.parametrize("sample", [0, 1])
def test_what_float16_cannot_hold_overflows_in_whichever_sample(value: float, sample: int, empty: Package) -> None:
    runs = [[("a", np.array([1.0, value if index == sample else 2.0]))] for index in (0, 1)]
    found = audit(empty, [*runs, [("b", np.array([5.0]))]], {"a", "b"})
    assert [each.name for each in found.overflowing] == ["a"]


def test_masks_of_infinities_do_not_overflow(empty: Package) -> None:
    runs = [[("a", np.array([1.0, -np.inf, TINY])), ("b", np.array([np.inf, 1e5]))]]
    a, b = audit(empty, runs, {"a", "b"}).ranges
    assert (a.largest, a.subnormal, a.overflows) == (1.0, 0.5, False)
    assert b.overflows


def test_the_largest_float16_does_not_overflow(empty: Package) -> None:
    found = audit(empty, [[("a", np.array([-LARGEST_HALF]))]], {"a"})
    assert found.overflowing == ()
    assert found.largest.largest == LARGEST_HALF


def test_a_value_of_zeros_is_neither(empty: Package) -> None:
    (found,) = audit(empty, [[("a", np.zeros(4))]], {"a"}).ranges
    assert (found.largest, found.subnormal, found.lost) == (0.0, 0.0, 0.0)


class Squares(nn.Module):
    """Values of about `scale` squared, undone before the output."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(torch.square(image * self.scale) + 1) / self.scale


def range_audit(module: nn.Module, folder: Path) -> Check:
    model = dataclasses.replace(lowered(seeded(module)), output_names=("output",))
    path = folder / "module.mlpackage"
    CoreMLTarget().compile(model, FP16, path)
    return {check.name: check for check in CoreMLTarget().checks(model, FP16, path, samples(2))}["range audit"]


def test_an_overflow_inside_fails_and_is_named(tmp_path: Path) -> None:
    found = range_audit(Squares(1000.0), tmp_path)
    assert found.passed is False
    assert "square" in found.detail
    assert "65504" in found.detail


def test_values_in_subnormals_are_reported(tmp_path: Path) -> None:
    found = range_audit(Squares(1e-3), tmp_path)
    assert found.passed
    assert "100%" in found.detail
    assert "square" in found.detail


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.scale = scale

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(image, self.conv.weight * self.scale).mean((2, 3)) / self.scale


def test_weights_are_audited_with_the_values(tmp_path: Path) -> None:
    model = dataclasses.replace(lowered(seeded(Scaled(1e-5))), output_names=("output",))
    path = tmp_path / "scaled.mlpackage"
    CoreMLTarget().compile(model, dataclasses.replace(FP16, precision="fp32"), path)
    package = read_package(path)
    weight = next(
        each.outputs[0].name
        for each in package.operations
        if each.type == "const" and each.attributes["val"].shape == (4, 3, 3, 3)
    )
    (found,) = audit(package, [], {weight}).ranges
    assert found.subnormal == pytest.approx(1)
    assert found.lost == pytest.approx(1)
