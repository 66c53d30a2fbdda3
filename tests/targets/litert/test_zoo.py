"""Models of the zoo with transforms, scans and mixers that the backbones have not."""

from pathlib import Path

import pytest
from zoo_models import ZOO, build, recipe

from mobilemix.api import deploy, prepare

pytest.importorskip("litert_torch", reason="needs pip install 'mobilemix[litert]'")

MODELS = ("afno", "gfnet", "lama", "hyena", "mamba", "mamba2", "mambavision")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_arrives_intact(name: str, tmp_path: Path) -> None:
    if package := ZOO[name].package:
        pytest.importorskip(package, reason=f"{name} needs {package}: pip install 'mobilemix[zoo]'")
    result = deploy(prepare(recipe(name), module=build(name)), recipe(name, target="litert"), tmp_path)
    assert result.parity.passed, result.parity
