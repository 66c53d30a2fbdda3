import collections
import stat
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorrt_graphs import CHANNELS, conv, fourier, needs_rtx, quantised

from mobilemix.errors import InputError, MissingDependencyError, TargetError
from mobilemix.targets.tensorrt import bindings, builder
from mobilemix.targets.tensorrt.builder import BuildOptions, Built, Refused, build, can_build, parse


def _build(model: Path, options: BuildOptions | None = None) -> Built:
    engine, log = model.with_suffix(".engine"), model.with_suffix(".log")
    return build(model, engine, log, "tensorrt-rtx", options or BuildOptions())


@needs_rtx
@pytest.mark.parametrize(("dtype", "precision"), [(np.float32, "fp32"), (np.float16, "fp16")])
def test_a_convolution_builds_in_the_precision_of_the_graph(dtype: type, precision: str, tmp_path: Path) -> None:
    model = conv(tmp_path / "conv.onnx", dtype)
    assert parse(model, "tensorrt-rtx") == ()
    built = _build(model)
    assert built.bytes == built.engine.stat().st_size > CHANNELS * 3 * 3 * 3 * np.dtype(dtype).itemsize
    assert built.builder.startswith("TensorRT for RTX 1.")
    assert {layer.type: layer.precision for layer in built.layers} == {
        "convolution": precision,
        "activation": precision,
    }
    assert built.layers[0].name == "stem/conv"
    assert "Engine generation completed" in model.with_suffix(".log").read_text()


@needs_rtx
def test_a_product_of_dequantised_tensors_counts_as_int8(tmp_path: Path) -> None:
    layers = _build(quantised(tmp_path / "conv.onnx")).layers
    assert {layer.precision for layer in layers if layer.type == "convolution"} == {"int8"}
    assert collections.Counter(layer.type for layer in layers)["dequantize"] == 2


@needs_rtx
def test_a_node_that_the_parser_lacks_is_named(tmp_path: Path) -> None:
    model = fourier(tmp_path / "fourier.onnx")
    (refusal,) = parse(model, "tensorrt-rtx")
    assert (refusal.node, refusal.operator) == ("mixer/fft", "DFT")
    with pytest.raises(
        Refused, match=r"TensorRT for RTX refuses node mixer/fft \(DFT\): it has no such operator"
    ) as error:
        _build(model)
    assert error.value.refusals == (refusal,)
    assert not model.with_suffix(".engine").exists()
    assert "DFT" in model.with_suffix(".log").read_text()


@needs_rtx
def test_a_file_that_is_not_onnx_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(b"nonsense")
    (refusal,) = parse(model, "tensorrt-rtx")
    assert refusal.reason


@needs_rtx
def test_a_dynamic_batch_builds_with_its_profile(tmp_path: Path) -> None:
    model = conv(tmp_path / "conv.onnx", batch="batch")
    assert _build(model, BuildOptions(batch=(1, 4, 8))).bytes > 0
    with pytest.raises(InputError, match=r"the shape of x in conv\.onnx is dynamic; say --dynamic-batch"):
        _build(model)


@needs_rtx
def test_an_impossible_profile_fails_with_the_builder_s_reason(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="TensorRT for RTX failed"):
        _build(conv(tmp_path / "conv.onnx", batch="batch"), BuildOptions(batch=(8, 4, 1)))


@needs_rtx
def test_options_of_rtx_reach_the_builder(tmp_path: Path) -> None:
    model = conv(tmp_path / "conv.onnx")
    usual = _build(model).engine.read_bytes()
    assert _build(model, BuildOptions(workspace_mb=16, compute_capabilities=("sm89",))).engine.read_bytes() != usual
    with pytest.raises(TargetError, match="SM12345"):
        _build(model, BuildOptions(compute_capabilities=("sm12345",)))


@needs_rtx
def test_a_timing_cache_is_written_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the builder of RTX, which keeps nothing in it, but has the same API."""
    monkeypatch.setitem(builder._LACKS, "tensorrt-rtx", {})
    model, cache = conv(tmp_path / "conv.onnx"), tmp_path / "cache"
    _build(model, BuildOptions(timing_cache=cache))
    assert cache.exists()
    _build(model, BuildOptions(timing_cache=cache))


@needs_rtx
def test_modules_in_the_user_s_folder_are_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = conv(tmp_path / "conv.onnx")
    (tmp_path / "json.py").write_text("raise SystemExit('taken for the standard library')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert parse(Path(model.name), "tensorrt-rtx") == ()


@pytest.mark.parametrize(
    ("flavour", "options", "message"),
    [
        ("tensorrt-rtx", {"timing_cache": Path("cache")}, "TensorRT for RTX has no timing cache: it times nothing"),
        ("tensorrt-rtx", {"hardware_compatibility": "ampere_plus"}, "no hardware compatibility: its engines run on"),
        ("tensorrt-rtx", {"version_compatible": True}, "no version compatible: its package has no lean runtime"),
        (
            "tensorrt",
            {"compute_capabilities": ("sm89",)},
            "TensorRT has no compute capabilities: it builds for the GPU",
        ),
    ],
)
def test_an_option_that_a_flavour_lacks_is_refused(
    flavour: bindings.Flavour, options: dict[str, object], message: str, tmp_path: Path
) -> None:
    model = conv(tmp_path / "conv.onnx")
    with pytest.raises(InputError, match=message):
        build(model, tmp_path / "engine", tmp_path / "log", flavour, BuildOptions(**options))  # type: ignore[arg-type]


def test_a_batch_for_a_model_that_has_a_fixed_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has a fixed batch"):
        _build(conv(tmp_path / "conv.onnx"), BuildOptions(batch=(1, 2, 4)))


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        ("import os, signal; print('[E] no such tactic'); os.kill(os.getpid(), signal.SIGSEGV)", "crashed .SIGSEGV"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed, most often because memory ran out"),
        ("import time; print('building', flush=True); time.sleep(60)", "longer than 0.5 s.*its log says: building"),
        ("raise SystemExit(3)", "failed with exit code 3; its log says: nothing"),
    ],
)
def test_a_worker_that_dies_is_one_clear_error(
    worker: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dying.py").write_text(worker, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(builder, "_WORKER", "dying")
    monkeypatch.setattr(bindings, "rtx_libraries", lambda: None)
    with pytest.raises(TargetError, match=f"TensorRT for RTX .*{message}"):
        _build(conv(tmp_path / "conv.onnx"), BuildOptions(timeout=0.5))


STAND_IN = """#!{python}
import pathlib, sys
pathlib.Path(__file__).with_name("arguments").write_text("\\n".join(sys.argv[1:]))
print("&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # trtexec")
engine = next(each for each in sys.argv if each.startswith("--saveEngine=")).split("=", 1)[1]
{ending}
"""


def _trtexec(folder: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of that name, alone on the PATH, that records its arguments."""
    program = folder / "trtexec"
    program.write_text(STAND_IN.format(python=sys.executable, ending=ending), encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


WRITES = "pathlib.Path(engine).write_bytes(b'plan')"


def test_trtexec_builds_where_the_package_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _trtexec(tmp_path, WRITES, monkeypatch)
    model = conv(tmp_path / "a model; rm -rf.onnx", batch="batch")
    options = BuildOptions(512, tmp_path / "cache", "ampere_plus", version_compatible=True, batch=(1, 4, 8))
    built = build(model, tmp_path / "engine", tmp_path / "log", "tensorrt", options)
    assert (tmp_path / "arguments").read_text().splitlines() == [
        f"--onnx={model}",
        f"--saveEngine={tmp_path / 'engine'}",
        "--stronglyTyped",
        "--noTF32",
        "--skipInference",
        "--memPoolSize=workspace:512",
        f"--timingCacheFile={tmp_path / 'cache'}",
        "--hardwareCompatibilityLevel=ampere+",
        "--versionCompatible",
        "--minShapes=x:1x3x16x16",
        "--optShapes=x:4x3x16x16",
        "--maxShapes=x:8x3x16x16",
    ]
    assert (built.bytes, built.builder, built.layers) == (4, "TensorRT 10.3.0 (trtexec)", ())
    assert "RUNNING" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        (
            "print('[E] [TRT] ModelImporter.cpp:948: ERROR: DFT'); raise SystemExit(1)",
            "exit code 1.*ModelImporter.*DFT",
        ),
        ("", "wrote no engine"),
    ],
)
def test_a_trtexec_that_fails_is_one_clear_error(
    ending: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _trtexec(tmp_path, ending, monkeypatch)
    with pytest.raises(TargetError, match=message):
        build(conv(tmp_path / "conv.onnx"), tmp_path / "engine", tmp_path / "log", "tensorrt", BuildOptions())


def test_tensorrt_can_be_built_with_trtexec_and_a_gpu_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _trtexec(tmp_path, WRITES, monkeypatch)
    monkeypatch.setattr(bindings, "missing_gpu", lambda: None)
    assert can_build("tensorrt") is None
    monkeypatch.setattr(bindings, "missing_gpu", lambda: "no NVIDIA driver")
    assert can_build("tensorrt") == "no NVIDIA driver"
    monkeypatch.setenv("PATH", "")
    assert "neither the Python package tensorrt nor trtexec" in str(can_build("tensorrt"))


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_without_any_package_the_extra_is_named(
    flavour: bindings.Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = conv(tmp_path / "conv.onnx")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert can_build(flavour)
    with pytest.raises(MissingDependencyError, match=rf"mobilemix\[{flavour}\]"):
        parse(model, flavour)
    with pytest.raises(MissingDependencyError, match=rf"mobilemix\[{flavour}\]"):
        build(model, tmp_path / "engine", tmp_path / "log", flavour, BuildOptions())
