import json
from pathlib import Path

import pytest

from mobilemix.errors import InputError
from mobilemix.manifest import Manifest, manifest_path, read_manifest
from mobilemix.recipe import Recipe


def make(tmp_path: Path) -> tuple[Path, Manifest]:
    artifact = tmp_path / "net.onnx"
    recipe = Recipe(model="affnet_t", target="onnx", input_shapes=((1, 3, 8, 8),), weights=Path("w.safetensors"))
    manifest = Manifest(recipe, {"model": {"name": "affnet_t"}}, {"bytes": 3}, {"passed": True}, {"compile": 1.5})
    manifest_path(artifact).write_text(manifest.to_json())
    return artifact, manifest


def test_a_manifest_comes_back_as_it_was(tmp_path):
    artifact, manifest = make(tmp_path)
    assert read_manifest(artifact) == manifest


def test_it_is_plain_json_beside_the_artifact(tmp_path):
    make(tmp_path)
    table = json.loads((tmp_path / "net.onnx.manifest.json").read_text())
    assert table["schema"] == 1
    assert table["recipe"]["input_shapes"] == [[1, 3, 8, 8]]


def test_no_manifest_is_one_clear_line(tmp_path):
    with pytest.raises(InputError, match="there is no manifest"):
        read_manifest(tmp_path / "net.onnx")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1}', '{"schema": 1, "recipe": []}', "\x00"]
)
def test_a_malformed_manifest_is_one_clear_line(tmp_path, text):
    artifact, _ = make(tmp_path)
    manifest_path(artifact).write_text(text)
    with pytest.raises(InputError, match="manifest"):
        read_manifest(artifact)


def test_a_manifest_whose_recipe_was_edited_into_nonsense_is_refused(tmp_path):
    artifact, _ = make(tmp_path)
    path = manifest_path(artifact)
    path.write_text(path.read_text().replace('"minimum_ios": 16', '"minimum_ios": 3'))
    with pytest.raises(InputError, match="iOS 3"):
        read_manifest(artifact)
