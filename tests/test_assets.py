import pytest
import torch
from safetensors import safe_open

from mobilemix import assets, create_model
from mobilemix.labels import read_labels
from mobilemix.models import registry
from mobilemix.preprocess import Preprocess

SPEC = registry.find("affnet_et_flowers")
RIGHT = 9  # of the ten photographs, as mobilemix/assets/README.md says
LARGEST_PHOTOGRAPH = 64 * 1024  # bytes


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    with safe_open(assets.path(str(SPEC.weights)), "pt") as file:
        return dict(file.metadata())


def test_checkpoint_metadata_agrees_with_the_registry_and_the_labels(metadata: dict[str, str]) -> None:
    assert metadata["classes"].split(",") == list(read_labels(assets.path(SPEC.labels)))
    assert int(metadata["input_size"]) == SPEC.input_size
    assert tuple(map(float, metadata["mean"].split(","))) == SPEC.mean
    assert tuple(map(float, metadata["std"].split(","))) == SPEC.std
    assert float(metadata["crop_pct"]) == SPEC.crop_pct


def test_classifies_the_photographs(metadata: dict[str, str]) -> None:
    classes = metadata["classes"].split(",")
    preprocess = Preprocess(SPEC.input_size, SPEC.input_size, SPEC.mean, SPEC.std, SPEC.crop_pct)
    photographs = assets.photographs()
    model = create_model(SPEC.name)
    with torch.no_grad():
        logits = model(torch.cat([torch.from_numpy(preprocess(path)) for path in photographs]))
    right = [path.stem.split("_")[0] == classes[row.argmax()] for path, row in zip(photographs, logits, strict=True)]
    assert sum(right) == RIGHT


def test_every_photograph_is_small_and_credited() -> None:
    text = assets.path("README.md").read_text(encoding="utf-8")
    for path in assets.photographs():
        assert path.stat().st_size < LARGEST_PHOTOGRAPH
        assert f"`{path.name}`" in text
