"""Every backbone to every target, with weights that make every layer matter, and every shipped recipe."""

from pathlib import Path

import pytest
from models_checks import distinct
from safetensors.torch import save_file

import mobilemix
from mobilemix.api import deploy, prepare
from mobilemix.models.registry import MODELS, build
from mobilemix.targets import is_installed

ARCHITECTURES = [name for name, spec in MODELS.items() if spec.weights is None]
RECIPES = sorted((Path(__file__).parents[1] / "export").glob("*.toml"))
DEPLOYMENTS = [("onnx", "fp32"), ("tensorrt", "fp16"), ("coreml", "fp16"), ("coreml", "fp32")]
QUANTISED = [
    *(("onnx", precision) for precision in ("int8", "int8-dynamic", "w8", "w4")),
    *(("coreml", precision) for precision in ("int8", "w8", "w4", "palette4")),
    ("tensorrt", "int8"),
]
SMALLEST = ("affnet_et", "casvit_xs", "efficientvim_m1", "dualtoken_vit_tiny")
SIDE = 128
"""Pixels of the images that quantised files are for."""

pytestmark = pytest.mark.slow


def checkpoint(name: str, folder: Path) -> Path:
    """Generated weights: fresh ones have layer scales near zero, under which faults would not show."""
    path = folder / f"{name}.safetensors"
    save_file(distinct(build(MODELS[name])).state_dict(), path)
    return path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_backbone_arrives_intact_at_every_target(name, tmp_path):
    weights = checkpoint(name, tmp_path)
    prepared = prepare(mobilemix.Recipe(model=name, weights=weights))
    for target, precision in DEPLOYMENTS:
        recipe = mobilemix.Recipe(model=name, weights=weights, target=target, precision=precision)
        result = deploy(prepared, recipe, tmp_path / target / precision)
        assert result.parity.passed, (target, precision, result.parity)
        assert all(agreement.top1 == 1 for agreement in result.parity.agreement.values()), (target, precision)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_backbone_is_quantised_for_every_target(name, tmp_path):
    """The smallest of a family in every form; the others in that which depends most on their graphs."""
    options = {"model": name, "weights": checkpoint(name, tmp_path), "input_shapes": ((1, 3, SIDE, SIDE),)}
    prepared = prepare(mobilemix.Recipe(**options))
    for target, precision in QUANTISED if name in SMALLEST else QUANTISED[:1]:
        ios = {"coreml": {"int8": 17, "w4": 18}}.get(target, {}).get(precision, 16)
        recipe = mobilemix.Recipe(**options, target=target, precision=precision, minimum_ios=ios)
        result = deploy(prepared, recipe, tmp_path / target / precision)
        assert result.parity.passed, (target, precision, result.parity)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_exports_and_verifies(path, tmp_path):
    recipe = mobilemix.load_recipe(path)
    if not is_installed(recipe.target):
        pytest.skip(f"needs pip install 'mobilemix[{recipe.target}]'")
    result = deploy(prepare(recipe), recipe, tmp_path)
    assert result.parity.passed, result.parity
    assert mobilemix.verify(result.path).passed
