import dataclasses
import platform
from collections.abc import Mapping
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
from coreml_lowered import FP16, FP32, IMAGE, lowered, samples
from PIL import Image

from mobilemix.errors import InputError
from mobilemix.targets import find_target
from mobilemix.targets.base import Check, Lowered
from mobilemix.targets.coreml import CoreMLTarget
from mobilemix.targets.coreml.package import read_package
from mobilemix.targets.coreml.target import PackageRunner

TARGET = CoreMLTarget()


@pytest.fixture(scope="module")
def model() -> Lowered:
    return lowered()


@pytest.fixture(scope="module")
def package(model: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "mixer.mlpackage"
    TARGET.compile(model, IMAGE, path)
    return path


def test_it_is_in_the_table() -> None:
    assert isinstance(find_target("coreml"), CoreMLTarget)


def test_histogram_counts_operations_most_frequent_first(package: Path) -> None:
    histogram = TARGET.op_histogram(package)
    assert histogram["gelu"] == 2
    assert "const" not in histogram
    assert list(histogram.values()) == sorted(histogram.values(), reverse=True)
    assert sum(histogram.values()) == sum(each.type != "const" for each in read_package(package).operations)


def test_load_refuses_what_is_no_package(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a Core ML package"):
        TARGET.load(tmp_path)


def test_the_runner_gives_float32_outputs_and_all_values(package: Path) -> None:
    runner = TARGET.load(package)
    (output,) = runner.run(samples()[0]).items()
    assert output[0] == "logits"
    assert output[1].dtype == np.float32
    names = [name for name, _ in runner.values(samples()[0])]
    assert names[-1] == "logits"
    assert any(name.startswith("layer_norm") for name in names)


def test_a_float32_package_is_its_own_build(model: Lowered, tmp_path: Path) -> None:
    path = tmp_path / "mixer.mlpackage"
    TARGET.compile(model, FP32, path)
    found = TARGET.checks(model, FP32, path, samples())
    assert [(check.name, check.passed) for check in found] == [("fp32 build", True), ("native", None)]
    assert "float64" in found[0].detail


class FakeCoreML:
    """In the place of Core ML's own runtime: answers with what the executor finds for the pixels that it is given."""

    scale = 1.0

    def __init__(self, path: str) -> None:
        self.runner = PackageRunner(read_package(Path(path)))

    def predict(self, given: Mapping[str, Image.Image]) -> dict[str, np.ndarray]:
        pixels = np.asarray(given["image"], dtype=np.float32).transpose(2, 0, 1)[None]
        answer = self.runner.executor.run({"image": pixels})
        return {name: value * self.scale for name, value in answer.items()}


@pytest.mark.parametrize(("scale", "passed"), [(1.0, True), (1.1, False)])
def test_core_ml_itself_is_compared_where_there_is_one(
    scale: float, passed: bool, model: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = dataclasses.replace(IMAGE, precision="fp32")
    TARGET.compile(model, recipe, tmp_path / "mixer.mlpackage")
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(ct.models, "MLModel", FakeCoreML)
    monkeypatch.setattr(FakeCoreML, "scale", scale)
    checks = TARGET.checks(model, recipe, tmp_path / "mixer.mlpackage", samples())
    assert (checks[-1].name, checks[-1].passed) == ("native", passed)


def test_elsewhere_it_says_that_it_was_not_run(model: Lowered, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    checks = TARGET.checks(model, IMAGE, package, samples())
    assert checks[-1] == Check("native", None, "Core ML itself needs macOS")


def test_fp16_is_the_default() -> None:
    assert TARGET.precisions[0] == FP16.precision
