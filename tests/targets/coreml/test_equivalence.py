import dataclasses
import re
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from coreml_lowered import FP16, FP32, lowered
from coreml_packages import seeded
from coremltools.converters.mil import Builder as mb
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn

from mobilemix.recipe import Recipe
from mobilemix.targets.base import Lowered
from mobilemix.targets.coreml.convert import convert, quiet
from mobilemix.targets.coreml.equivalence import compare, rounded
from mobilemix.targets.coreml.package import Package, read_package


def package(model: Lowered, recipe: Recipe, folder: Path) -> Package:
    path = folder / f"{recipe.precision}-{recipe.minimum_ios}.mlpackage"
    convert(model, recipe, path)
    return read_package(path)


def both(module: nn.Module, folder: Path, ios: int = 16) -> tuple[Package, Package]:
    model = lowered(seeded(module))
    fp32, fp16 = (package(model, dataclasses.replace(recipe, minimum_ios=ios), folder) for recipe in (FP32, FP16))
    return fp32, fp16


@pytest.mark.parametrize("size", [12, 399, 400, 1000])
def test_rounding_is_what_coremltools_stores(size: int, tmp_path: Path) -> None:
    special = [0.0, -0.0, 1e-40, 1e-9, -1e-9, 2.0**-24, 3.1e-8, -6e-8, 9e-8, 1e-5, 0.1, 65504.0]
    generator = np.random.default_rng(size)
    values = np.concatenate([special, generator.standard_normal(size) * 10.0 ** generator.integers(-9, 4, size)])
    values = values[:size].astype(np.float32)

    @mb.program(input_specs=[mb.TensorSpec(shape=(size,))], opset_version=ct.target.iOS16)
    def program(x: object) -> object:
        return mb.mul(x=x, y=values)

    with quiet():
        model = ct.convert(program, minimum_deployment_target=ct.target.iOS16, skip_model_load=True)
    model.save(str(tmp_path / "stored.mlpackage"))
    constants = [
        each.attributes["val"].array
        for each in read_package(tmp_path / "stored.mlpackage").operations
        if each.type == "const" and each.attributes["val"].dtype == "fp16"
    ]
    (stored,) = (constant for constant in constants if constant.shape == (size,))
    np.testing.assert_array_equal(rounded(values).view(np.uint16), stored.view(np.uint16))


@given(arrays.arrays(np.float32, st.integers(1, 30), elements=st.floats(-65504, 65504, width=32)))
def test_small_constants_never_vanish(values: np.ndarray) -> None:
    result = rounded(values)
    assert np.array_equal(result == 0, values == 0)
    assert np.array_equal(np.signbit(result), np.signbit(values))


class Gather(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("index", torch.tensor([3, 1, 0, 2, 5]))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.index_select(image, 3, self.index).mean((2, 3))


@pytest.mark.parametrize("ios", [15, 17])
def test_narrower_integers_are_the_same_program(ios: int, tmp_path: Path) -> None:
    fp32, fp16 = both(Gather(), tmp_path, ios)
    assert compare(fp32, fp16).differences == ()
    indices = {
        each.attributes["val"].dtype
        for each in fp16.operations
        if each.type == "const" and each.attributes["val"].shape == (5,)
    }
    assert indices == ({"uint16"} if ios == 17 else {"int32"})


class Huge(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (image * 1e6).tanh()


def test_constants_beyond_float16_leave_an_operation_in_float32(tmp_path: Path) -> None:
    fp32, fp16 = both(Huge(), tmp_path)
    found = compare(fp32, fp16)
    assert found.differences == ()
    assert found.left_in_float32 == ("mul",)
    assert "tanh" not in found.left_in_float32


def test_a_program_equals_itself_and_counts_what_it_compared(tmp_path: Path) -> None:
    fp32 = package(lowered(), FP32, tmp_path)
    found = compare(fp32, fp32)
    assert found.differences == ()
    assert found.operations == sum(each.type != "const" for each in fp32.operations)
    assert found.constants >= sum(each.type == "const" for each in fp32.operations)
    assert found.in_float16 == frozenset()


class Affine(nn.Module):
    """What a norm ends with, and nothing behind it."""

    def __init__(self, scale: float, shift: float) -> None:
        super().__init__()
        self.scale, self.shift = torch.full((16,), scale), torch.full((16,), shift)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.shift + self.scale * torch.tanh(image)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (1.0, 0.5), (0.5, 0.0)])
def test_times_ones_and_plus_zeros_change_nothing(scale: float, shift: float, tmp_path: Path) -> None:
    assert compare(*both(Affine(scale, shift), tmp_path)).differences == ()


def test_one_element_beside_ones_changes_something(tmp_path: Path) -> None:
    fp32 = package(lowered(seeded(Affine(1.0, 0.5))), FP32, tmp_path)
    other = Affine(1.0, 0.5)
    other.scale[3] = 1.5
    fp16 = package(lowered(seeded(other)), FP16, tmp_path / "other")
    assert compare(fp32, fp16).differences


def test_which_values_are_float16(tmp_path: Path) -> None:
    fp32, fp16 = (package(lowered(), recipe, tmp_path) for recipe in (FP32, FP16))
    names = compare(fp32, fp16).in_float16
    computed = {output.name for each in fp32.operations if each.type != "const" for output in each.outputs}
    assert computed <= names
    assert any("stem_0_weight" in name for name in names)


class Identity(nn.Module):
    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.first(image).mean((2, 3))


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3), "has outputs of shape"),
        (nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1), r"weight, has shape \(4, 3, 1, 1\)"),
        (nn.ReLU(), nn.Sigmoid(), "sigmoid '.*' stands where relu '.*' is expected"),
        (nn.Sigmoid(), nn.Identity(), "'image' is an input in one program and computed in the other"),
    ],
)
def test_another_program_is_different(one: nn.Module, other: nn.Module, message: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    fp32 = package(lowered(seeded(Identity(one))), FP32, tmp_path)
    fp16 = package(lowered(seeded(Identity(other))), FP16, tmp_path / "other")
    differences = compare(fp32, fp16).differences
    assert any(re.search(message, each) for each in differences)


@pytest.mark.parametrize("changes", [{"minimum_ios": 17}, {"input": "image"}])
def test_another_interface_is_different(changes: dict[str, object], tmp_path: Path) -> None:
    model = lowered(Identity(nn.Sigmoid()))
    fp32 = package(model, FP32, tmp_path)
    fp16 = package(model, dataclasses.replace(FP16, **changes), tmp_path)
    assert any(("opset" in each) or ("inputs" in each) for each in compare(fp32, fp16).differences)
