"""Models that mix by Fourier transforms and by scans, with an open batch."""

from pathlib import Path

import pytest
from tensorrt_graphs import needs_rtx
from zoo_models import ZOO, build, recipe

from mobilemix.api import Prepared, deploy, prepare

BATCH = (1, 4, 6)
SMALL = ("afno", "mambavision")
"""One of each kind."""


def prepared(name: str, target: str) -> Prepared:
    if package := ZOO[name].package:
        pytest.importorskip(package, reason=f"{name} needs {package}: pip install 'mobilemix[zoo]'")
    return prepare(recipe(name, target=target, dynamic_batch=BATCH), module=build(name))


def check(model: Prepared, name: str, target: str, precision: str, folder: Path) -> None:
    stated = recipe(name, target=target, precision=precision, dynamic_batch=BATCH)
    result = deploy(model, stated, folder / precision)
    assert result.parity.passed, result.parity
    assert {int(name.split(" × ")[1]) for name in result.parity.agreement} == {1, 4, 5, 6}


@pytest.mark.parametrize("name", SMALL)
def test_one_that_transforms_and_one_that_scans(name: str, tmp_path: Path) -> None:
    check(prepared(name, "onnx"), name, "onnx", "fp32", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_model_for_every_batch(name: str, tmp_path: Path) -> None:
    model = prepared(name, "onnx")
    for precision in ("fp32", "fp16"):
        check(model, name, "onnx", precision, tmp_path)


@pytest.mark.slow
@needs_rtx
@pytest.mark.parametrize("name", SMALL)
def test_engines_with_a_profile(name: str, tmp_path: Path) -> None:
    check(prepared(name, "tensorrt-rtx"), name, "tensorrt-rtx", "fp16", tmp_path)
