from pathlib import Path

import pytest
import torch
from coreml_compressible import lowered
from coreml_lowered import FP16, FP32
from coreml_lowered import lowered as lowered_module
from coreml_packages import seeded
from torch import nn

from mobilemix.quantization.options import FLOAT, Quantization
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Lowered
from mobilemix.targets.coreml.convert import convert
from mobilemix.targets.coreml.layers import LEAST, Layer, layers
from mobilemix.targets.coreml.package import read_package
from mobilemix.targets.coreml.plan import by_weight, choose


@pytest.fixture(scope="module")
def model() -> Lowered:
    return lowered()


def found(model: Lowered, recipe: Recipe, folder: Path) -> list[Layer]:
    path = folder / f"{recipe.precision}.mlpackage"
    convert(model, recipe, path)
    return layers(read_package(path), model)


def test_layers_have_the_same_names_in_both_precisions(model: Lowered, tmp_path: Path) -> None:
    names = [[layer.name for layer in found(model, recipe, tmp_path)] for recipe in (FP16, FP32)]
    assert names[0] == names[1]
    assert [name.rpartition("/")[0] for name in names[0]] == ["stem.1", "depthwise", "expand", "reduce", "gate", "head"]


def test_values_that_may_be_rounded(model: Lowered, tmp_path: Path) -> None:
    rounded = {layer.module: layer.value is not None for layer in found(model, FP32, tmp_path)}
    assert rounded == {
        "stem.1": True,
        "depthwise": False,
        "expand": True,
        "reduce": True,
        "gate": False,  # it reads a spectrum
        "head": False,  # of one vector
    }


class Spectral(nn.Module):
    """Nothing but a transform, a small layer and a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Conv2d(3, 8, 1)
        self.large = nn.Linear(8, 64)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.fft.rfft2(image).abs()
        return self.large(self.small(x).mean((2, 3)))


def test_matrices_of_transforms_and_small_weights_are_no_layers(tmp_path: Path) -> None:
    layer = found(lowered_module(seeded(Spectral())), FP32, tmp_path)
    assert [each.module for each in layer] == ["large"]
    assert 8 * 64 >= LEAST > 3 * 8
    assert layer[0].value is None, "what a spectrum is averaged to, no norm in between"


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize(("pattern", "compressed"), [("nothing", True), ("second*", False)])
def test_a_shared_weight_is_compressed_if_all_its_layers_are(pattern: str, compressed: bool, tmp_path: Path) -> None:
    model = lowered_module(seeded(Tied()), (1, 4, 32), input_names=("x",), output_names=("output",))
    both = found(model, FP32, tmp_path)
    assert len({layer.weight for layer in both}) == 1
    chosen = [(layer, FLOAT if layer.module == pattern.removesuffix("*") else "w8") for layer in both]
    assert bool(by_weight(chosen)) == compressed


def test_the_last_pattern_counts(model: Lowered, tmp_path: Path) -> None:
    options = Quantization(layers=(("*", "w4"), ("head/*", "float"), ("head", "w8")))
    chosen = choose(found(model, FP32, tmp_path), Recipe(precision="int8", quantization=options))
    assert {layer.module: precision for layer, precision in chosen}["head"] == "w8"
    assert {precision for _, precision in chosen} == {"w4", "w8"}
