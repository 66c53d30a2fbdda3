"""Every backbone in every precision, parsed and built by NVIDIA's own code on a machine that needs no GPU."""

import warnings
from pathlib import Path

import pytest
import torch
import zoo_models
from tensorrt_graphs import needs_rtx
from test_backbones import ARCHITECTURES, checkpoint

import mobilemix
from mobilemix.api import Export, Prepared, deploy, prepare
from mobilemix.targets.tensorrt.builder import parse

pytestmark = [pytest.mark.slow, needs_rtx]

TARGET = "tensorrt-rtx"
PRECISIONS = ("fp32", "fp16", "int8")
BATCH = (1, 8, 64)
MIXERS = ("gfnet", "mambavision")
"""Of the zoo: one that mixes by Fourier transforms, one by a scan."""


def built(prepared: Prepared, recipe: mobilemix.Recipe, folder: Path) -> Export:
    """Export, which raises where NVIDIA's parser or builder refuses the model."""
    done = deploy(prepared, recipe, folder)
    assert done.parity.passed, done.parity
    engine = done.path.with_suffix(".engine")
    assert engine.stat().st_size == done.manifest.build["bytes"] > 0
    assert done.manifest.build["layers"].get(recipe.precision)
    return done


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_backbone_builds_in_every_precision(name: str, tmp_path: Path) -> None:
    weights = checkpoint(name, tmp_path)
    prepared = prepare(mobilemix.Recipe(model=name, weights=weights))
    sizes = {}
    for precision in PRECISIONS:
        recipe = mobilemix.Recipe(model=name, weights=weights, target=TARGET, precision=precision)
        sizes[precision] = built(prepared, recipe, tmp_path / precision).manifest.build["bytes"]
    assert sizes["fp16"] < sizes["fp32"]


@pytest.mark.parametrize("name", MIXERS)
def test_models_of_the_zoo_build(name: str, tmp_path: Path) -> None:
    prepared = prepare(zoo_models.recipe(name), module=zoo_models.build(name))
    for precision in ("fp32", "fp16"):
        built(prepared, zoo_models.recipe(name, target=TARGET, precision=precision), tmp_path / precision)


def test_a_dynamic_batch_builds(tmp_path: Path) -> None:
    recipe = mobilemix.Recipe(model="efficientvim_m1", target=TARGET, precision="fp16", dynamic_batch=BATCH)
    built(prepare(recipe), recipe, tmp_path)


def test_the_stock_export_is_refused(tmp_path: Path) -> None:
    """What shows that the tests above can fail."""
    module = mobilemix.create_model("affnet_t").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, (torch.randn(1, 3, 256, 256),), tmp_path / "stock.onnx", dynamo=True, verbose=False)
    assert {refusal.operator for refusal in parse(tmp_path / "stock.onnx", TARGET)} == {"DFT"}
