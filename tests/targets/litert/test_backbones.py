"""Every backbone in every precision, with weights that make every layer matter."""

from pathlib import Path

import pytest
from models_checks import distinct
from safetensors.torch import save_file

from mobilemix import api
from mobilemix.models.registry import MODELS, build
from mobilemix.recipe import Recipe

pytest.importorskip("litert_torch", reason="needs pip install 'mobilemix[litert]'")

ARCHITECTURES = [name for name, spec in MODELS.items() if spec.weights is None]


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_backbone_arrives_intact(name: str, tmp_path: Path) -> None:
    weights = tmp_path / f"{name}.safetensors"
    save_file(distinct(build(MODELS[name])).state_dict(), weights)
    prepared = api.prepare(Recipe(model=name, weights=weights))
    for precision in ("fp32", "fp16", "int8"):
        recipe = Recipe(model=name, weights=weights, target="litert", precision=precision)
        result = api.deploy(prepared, recipe, tmp_path / precision)
        assert result.parity.passed, (precision, result.parity)
