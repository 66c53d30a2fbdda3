"""One small network to both targets: artifacts, manifests, and verifying again."""

import dataclasses
import json
from pathlib import Path

import pytest
from tensorrt_graphs import needs_rtx

from mobilemix import api
from mobilemix.errors import InputError
from mobilemix.inspection import inspect_artifact
from mobilemix.manifest import manifest_path, read_manifest
from mobilemix.recipe import Recipe
from mobilemix.targets import find_target
from mobilemix.targets.tensorrt import builder

ROUNDING = {"fp32": 1e-6, "fp16": 1e-3}
TARGETS = ["tensorrt", pytest.param("tensorrt-rtx", marks=needs_rtx)]
SUFFIXES = {"tensorrt": ".tensorrt.onnx", "tensorrt-rtx": ".rtx.onnx"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


def exported(prepared: api.Prepared, recipe: Recipe, folder: Path, **fields: str) -> api.Export:
    return api.deploy(prepared, dataclasses.replace(recipe, **fields), folder / "-".join(fields.values()))


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_the_table_finds_it(name: str) -> None:
    target = find_target(name)
    assert (target.name, target.suffix, target.precisions[0]) == (name, SUFFIXES[name], "fp16")


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("target", TARGETS)
def test_a_network_arrives_intact(
    target: str, precision: str, prepared: api.Prepared, recipe: Recipe, folder: Path
) -> None:
    result = exported(prepared, recipe, folder, target=target, precision=precision)
    assert result.parity.passed, result.parity
    assert result.path.name == f"make{SUFFIXES[target]}"
    assert result.parity.agreement["photographs"].relative_l2 < ROUNDING[precision]
    has_engine = result.path.with_suffix(".engine").exists()
    assert has_engine == bool(result.manifest.build["files"])
    assert has_engine == (target == "tensorrt-rtx") or builder.can_build("tensorrt") is None
    report = inspect_artifact(result.path)
    assert [(value.name, value.dtype) for value in (*report.inputs, *report.outputs)] == [
        ("image", "float32"),
        ("logits", "float32"),
    ]
    assert "TensorRT" not in [obstacle.stops for obstacle in report.obstacles]
    assert report.provenance is not None
    assert report.provenance["target"] == target


def test_the_manifest_comes_back(prepared: api.Prepared, recipe: Recipe, folder: Path) -> None:
    result = exported(prepared, recipe, folder, target="tensorrt", precision="fp32")
    assert read_manifest(result.path).build == result.manifest.build
    path = manifest_path(result.path)
    table = json.loads(path.read_text())
    del table["build"]  # as an older version wrote it
    path.write_text(json.dumps(table))
    assert read_manifest(result.path).build == {}


@needs_rtx
def test_it_is_verified_again_with_its_engine(prepared: api.Prepared, recipe: Recipe, tmp_path: Path) -> None:
    result = exported(prepared, recipe, tmp_path, target="tensorrt-rtx", precision="fp16")
    result.path.with_suffix(".log").unlink()
    parity = api.verify(result.path)
    assert parity.passed
    assert {check.name: check.passed for check in parity.checks}["make.rtx.engine unchanged"]
    engine = result.path.with_suffix(".engine")
    engine.write_bytes(engine.read_bytes()[:-1] + b"?")
    assert not api.verify(result.path).passed
    engine.unlink()
    assert not api.verify(result.path).passed


def test_a_file_that_is_cut_short_is_no_artifact(prepared: api.Prepared, recipe: Recipe, tmp_path: Path) -> None:
    result = exported(prepared, recipe, tmp_path, target="tensorrt", precision="fp32")
    result.path.write_bytes(result.path.read_bytes()[:100])
    with pytest.raises(InputError):
        api.verify(result.path)


def test_images_are_no_inputs(prepared: api.Prepared, recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the target tensorrt takes tensors"):
        exported(prepared, recipe, tmp_path, target="tensorrt", input="image")
