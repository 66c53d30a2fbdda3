"""What verification says of parsing, building and running, on machines with and without each."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import helper
from tensorrt_graphs import needs_rtx

from mobilemix import api
from mobilemix.errors import InputError, TargetError
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Check, Inputs
from mobilemix.targets.onnx.runtime import OnnxRunner
from mobilemix.targets.tensorrt import bindings, builder, checks, convert
from mobilemix.targets.tensorrt.builder import BuildOptions, Built
from mobilemix.targets.tensorrt.engine import EngineRunner

NOTHING = "neither the Python package tensorrt nor trtexec is installed"


@pytest.fixture(scope="module")
def written(prepared: api.Prepared, recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("written") / "make.tensorrt.onnx"
    convert.write(prepared.lowered, dataclasses.replace(recipe, precision="fp16"), path)
    return path


@pytest.fixture
def asked(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, precision="fp16")


def found(checks_: list[Check]) -> dict[str, bool | None]:
    return {check.name: check.passed for check in checks_}


def test_a_file_with_what_the_parser_lacks_fails(written: Path, tmp_path: Path) -> None:
    assert checks.supported(written).passed
    model = onnx.load(written)
    model.graph.node.append(helper.make_node("Unique", [model.graph.node[0].output[0]], ["other"], name="added"))
    onnx.save(model, tmp_path / "m.onnx")
    check = checks.supported(tmp_path / "m.onnx")
    assert check.passed is False
    assert check.detail == "Unique added: NVIDIA's parser does not have it"


def test_with_nothing_installed_one_line_says_what_was_not_checked_and_how_to(
    written: Path, asked: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "can_build", lambda flavour: NOTHING)
    (check,) = checks.unbuilt(written, asked, "tensorrt")
    assert check.passed is None
    assert check.detail.startswith(f"neither parsed by TensorRT nor built: {NOTHING}; ")
    command = "trtexec --onnx=make.tensorrt.onnx --saveEngine=make.tensorrt.engine --stronglyTyped --noTF32"
    assert command in check.detail


@needs_rtx
def test_tensorrt_for_rtx_stands_in_as_far_as_it_goes(written: Path, asked: Recipe, monkeypatch: Any) -> None:
    monkeypatch.setattr(bindings, "missing_gpu", lambda: "no NVIDIA driver")
    parsed, missing = checks.unbuilt(written, asked, "tensorrt")
    assert (parsed.name, parsed.passed) == ("TensorRT for RTX", True)
    assert "parses it and builds" in parsed.detail
    assert "not kept" in parsed.detail
    assert missing.passed is None
    assert missing.detail.startswith("not built by TensorRT: ")
    assert not list(written.parent.glob("*.engine"))


def test_a_file_that_tensorrt_for_rtx_refuses_fails(written: Path, asked: Recipe, monkeypatch: Any) -> None:
    def refuse(*_: Any) -> Built:
        raise TargetError("TensorRT for RTX refuses node a")

    monkeypatch.setattr(builder, "build", refuse)
    check = checks.ahead_of_time(written, asked)
    assert (check.passed, check.detail) == (False, "TensorRT for RTX refuses node a")


class Engine(EngineRunner):
    """Answers as ONNX Runtime does, but for an error."""

    error = 0.0
    shapes: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, path: Path, *, host_code: bool = False) -> None:
        assert not host_code
        self.reference = OnnxRunner(path.with_suffix(".onnx"))

    def latencies(self, inputs: Inputs, count: int) -> list[float]:
        return [0.25] * count

    def run(self, inputs: Inputs) -> dict[str, np.ndarray]:
        self.shapes.extend(value.shape for value in inputs.values())
        return {name: value * (1 + self.error) for name, value in self.reference.run(inputs).items()}

    def values(self, inputs: Inputs) -> Iterator[tuple[str, np.ndarray]]:
        yield from self.run(inputs).items()


@pytest.fixture
def engine(written: Path) -> Iterator[Path]:
    path = convert.engine_path(written)
    path.write_bytes(b"engine")
    yield path
    path.unlink()


def ran(written: Path, engine: Path, prepared: api.Prepared, asked: Recipe) -> list[Check]:
    samples = prepared.samples["noise"]
    return checks.ran(written, engine, asked, samples, "tensorrt")


def test_an_engine_that_cannot_run_here_is_not_said_to_have_run(
    written: Path, engine: Path, prepared: api.Prepared, asked: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bindings, "missing_gpu", lambda: "no NVIDIA driver")
    built, parity = ran(written, engine, prepared, asked)
    assert (built.name, built.passed) == ("TensorRT engine", True)
    assert parity.passed is None
    assert parity.detail.startswith(
        "the engine was not run: no NVIDIA driver; on the device, run mobilemix verify make"
    )


@pytest.mark.parametrize(("error", "passed"), [(0.0, True), (0.5, False), (float("nan"), False)])
def test_an_engine_is_held_against_the_file(
    error: float, passed: bool, written: Path, engine: Path, prepared: api.Prepared, asked: Recipe, monkeypatch: Any
) -> None:
    monkeypatch.setattr(bindings, "missing_gpu", lambda: None)
    monkeypatch.setattr(bindings, "gpu_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(Engine, "error", error)
    monkeypatch.setattr(checks, "EngineRunner", Engine)
    built, parity = ran(written, engine, prepared, asked)
    assert built.passed
    assert parity.passed is passed, parity.detail
    assert parity.detail.endswith("against the ONNX file · NVIDIA H100 · 0.25 ms at batch 1")


def test_a_dynamic_engine_is_held_against_the_file_at_every_batch_of_its_profile(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dynamic = dataclasses.replace(recipe, precision="fp16", dynamic_batch=(3, 4, 8))
    prepared = api.prepare(dynamic)
    path = tmp_path / "make.tensorrt.onnx"
    convert.write(prepared.lowered, dynamic, path)
    convert.engine_path(path).write_bytes(b"engine")
    monkeypatch.setattr(bindings, "missing_gpu", lambda: None)
    monkeypatch.setattr(bindings, "gpu_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(checks, "EngineRunner", Engine)
    monkeypatch.setattr(Engine, "shapes", [])
    samples = list(prepared.probes.values())[:1]
    _, parity = checks.ran(path, convert.engine_path(path), dynamic, samples, "tensorrt")
    assert parity.passed, parity.detail
    assert [shape[0] for shape in Engine.shapes] == [3, 4, 8]
    assert parity.detail.endswith("0.25 ms at batch 8")


def test_an_engine_that_does_not_load_fails(
    written: Path, engine: Path, prepared: api.Prepared, asked: Recipe, monkeypatch: Any
) -> None:
    def load(path: Path, *, host_code: bool) -> Engine:
        raise InputError("not an engine")

    monkeypatch.setattr(bindings, "missing_gpu", lambda: None)
    monkeypatch.setattr(checks, "EngineRunner", load)
    _, parity = ran(written, engine, prepared, asked)
    assert (parity.passed, parity.detail) == (False, "not an engine")


def test_all_of_them_for_a_file_alone(
    written: Path, prepared: api.Prepared, asked: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "can_build", lambda flavour: NOTHING)
    checked = found(checks.run(prepared.lowered, asked, written, prepared.samples["noise"], "tensorrt"))
    assert checked.pop("TensorRT engine") is None
    assert {"onnx.checker", "NVIDIA's parser, by its list", "float16 range"} <= checked.keys()
    assert all(checked.values()), checked


def test_options_for_rtx_are_those_that_it_has(written: Path, asked: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[BuildOptions] = []

    def build(model: Path, engine: Path, log: Path, flavour: str, options: BuildOptions) -> Built:
        options.check("tensorrt-rtx")
        given.append(options)
        return Built(engine, 1.0, 10, "TensorRT for RTX 1.7", ())

    monkeypatch.setattr(builder, "build", build)
    recipe = dataclasses.replace(asked, workspace_mb=32, version_compatible=True, hardware_compatibility="ampere_plus")
    assert checks.ahead_of_time(written, recipe).passed
    assert given == [BuildOptions(workspace_mb=32)]
