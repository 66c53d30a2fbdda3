import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SHAPE

from mobilemix import api, targets
from mobilemix.models import registry
from mobilemix.targets.tensorrt import builder

COMMAND = [sys.executable, "-m", "mobilemix"]


def test_export_says_where_how_large_how_long_and_how_close(command, network, tmp_path):
    code, out, _ = command("export", network, "--input", SHAPE, "-o", tmp_path / "out")
    assert code == 0
    closing = out.splitlines()[-1]
    assert closing.startswith(f"verified {tmp_path / 'out' / 'make.mlpackage'} · ")
    for part in (" MB · ", " s · relative error ", " against float64 PyTorch · top-1 "):
        assert part in closing
    assert (tmp_path / "out" / "make.mlpackage" / "Manifest.json").exists()


@pytest.mark.parametrize("chosen", [["-t", "onnx,coreml"], ["-t", "onnx", "--target", "coreml"]])
def test_several_targets(command, network, tmp_path, chosen):
    code, out, _ = command("export", network, "--input", f"tensor:{SHAPE}", "-o", tmp_path / "out", "--json", *chosen)
    assert code == 0
    exports = json.loads(out)
    assert [Path(one["path"]).name for one in exports] == ["make.onnx", "make.mlpackage"]
    assert all(one["manifest"]["parity"]["passed"] for one in exports)


TOKENS = """
import torch
from torch import nn


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(9, 4)

    def forward(self, ids, spectrum):
        return torch.fft.ifft(torch.fft.fft(self.words(ids)) * spectrum).real
"""


def test_inputs_of_other_dtypes(command, tmp_path):
    (tmp_path / "tokens.py").write_text(TOKENS)
    inputs = ["--input", "tensor:int64:1x6", "--input", "complex64:6x4"]
    arguments = ["export", f"{tmp_path}/tokens.py:Tokens", *inputs, "-t", "onnx", "-o", tmp_path, "--json"]
    code, out, _ = command(*arguments)
    assert code == 0
    (one,) = json.loads(out)
    assert one["manifest"]["recipe"]["input_dtypes"] == ["int64", "complex64"]
    assert one["manifest"]["provenance"]["inputs"]["spectrum"]["shape"] == [6, 4, 2]


def test_verify_and_its_exit_codes(command, network, tmp_path):
    command("export", network, "-t", "onnx", "--input", SHAPE, "-o", tmp_path)
    code, out, _ = command("verify", tmp_path / "make.onnx")
    assert code == 0
    assert out.splitlines()[-1].startswith("verified ")
    manifest = tmp_path / "make.onnx.manifest.json"
    manifest.write_text(manifest.read_text().replace('"weights_sha256": "', '"weights_sha256": "0'))
    code, out, _ = command("verify", tmp_path / "make.onnx", "--json")
    assert code == 1
    assert json.loads(out)["passed"] is False


def test_a_failed_verification_exits_with_1_and_says_why(command, network, tmp_path):
    arguments = ("export", network, "-t", "onnx", "--input", SHAPE, "-o", tmp_path, "--tolerance", "1e-12")
    code, out, _ = command(*arguments)
    assert code == 1
    assert "FAILED" in out
    assert "first departure: " in out


def test_a_recipe_and_options_over_it(command, network, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('target = "onnx"\nopset = 19\ninput_shapes = [1, 3, 16, 16]\n')
    code, out, _ = command("export", network, "--recipe", recipe, "--opset", "20", "-o", tmp_path, "--json")
    assert code == 0
    assert json.loads(out)[0]["manifest"]["recipe"]["opset"] == 20


def test_inspect_a_model_and_what_became_of_it(command, network, tmp_path):
    code, out, _ = command("inspect", network, "--input", SHAPE)
    assert code == 0
    for part in ("fft_rfft2", "complex_to_real", "multiply-adds", "nothing is in the way"):
        assert part in out
    code, out, _ = command("inspect", network, "--input", SHAPE, "--json")
    assert code == 0
    after = json.loads(out)["after"]["multiply_adds"]
    command("export", network, "-t", "onnx", "--input", SHAPE, "-o", tmp_path)
    code, out, _ = command("inspect", tmp_path / "make.onnx", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["cost"]["multiply_adds"] == after
    assert report["provenance"]["target"] == "onnx"
    assert "ONNX opset 18" in command("inspect", tmp_path / "make.onnx")[1]


def test_inspect_takes_a_recipe(command, network, tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'model = "{network}"\ninput_shapes = [2, 3, 16, 16]\n')
    code, out, _ = command("inspect", "--recipe", recipe, "--json")
    assert code == 0
    assert json.loads(out)["inputs"][0]["shape"] == [2, 3, 16, 16]


def test_models_lists_what_is_counted_and_what_the_papers_say(command, monkeypatch):
    some = {name: registry.MODELS[name] for name in ("efficientvim_m1", "casvit_xs")}
    monkeypatch.setattr(registry, "MODELS", some)
    code, out, _ = command("models", "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows.keys() == some.keys()
    assert rows["efficientvim_m1"]["published_parameters"] == 6_700_000
    assert abs(rows["efficientvim_m1"]["parameters"] / 6_700_000 - 1) < 0.01
    code, out, _ = command("models")
    assert code == 0
    assert all(name in out for name in some)
    assert "arXiv:2411.15241" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "afnet_t"], "unknown model 'afnet_t'; did you mean 'affnet_t'? Valid: "),
        (["export", "-t", "corml"], "unknown target 'corml'; did you mean 'coreml'? Valid: coreml, litert, onnx"),
        (["export", "--precision", "fp61"], "unknown precision 'fp61'; did you mean 'fp16'? Valid: bf16, fp16, fp32"),
        (["export", "-t", "litret"], "unknown target 'litret'; did you mean 'litert'?"),
        (["export", "-t", "tensorrt", "--opset", "17"], "opset 17 is not supported; valid: 18 to 22"),
        (["export", "--workspace", "64"], "the target coreml has no workspace_mb; only tensorrt and tensorrt-rtx"),
        (["export", "-t", "onnx", "--timing-cache", "cache"], "the target onnx has no timing_cache; only tensorrt can"),
        (["export", "-t", "onnx", "--version-compatible"], "the target onnx has no version_compatible"),
        (["export", "-t", "onnx", "--hardware-compatibility", "none"], "the target onnx has no hardware_compatibility"),
        (["export", "-t", "tensorrt-rtx", "--version-compatible"], "the target tensorrt-rtx has no version_compatible"),
        (["export", "-t", "tensorrt", "--workspace", "0"], "workspace_mb must be above 0, not 0"),
        (
            ["export", "-t", "tensorrt", "--hardware-compatibility", "ampere"],
            "unknown hardware compatibility 'ampere'; did you mean 'ampere_plus'?",
        ),
        (["export", "--opset", "9"], "opset 9 is not supported; valid: 18 to 22"),
        (["export", "--minimum-ios", "12"], "iOS 12 is not supported; valid: 15, 16, 17, 18"),
        (["export", "--input", "1x3xtall"], "--input cannot be '1x3xtall'"),
        (["export", "--input", "image", "--input", "tensor"], "--input is image or tensor, not both"),
        (["export", "--input", "int46:1x8"], "unknown kind or dtype of --input 'int46'; did you mean 'int64'?"),
        (["export", "--input", "int64"], "--input int64 needs a shape too, such as int64:1x128"),
        (["export", "--input", "1x8:1x8"], "--input cannot be '1x8:1x8'"),
        (["export", "--input", "int64:1x3x224x224"], "takes images, which are float32, not int64"),
        (["export", "--mean", "a,b"], "'a,b' is not a comma list of numbers"),
        (["export", "--mean", "0.5,0.5,0.5"], "one value a channel"),
        (["export", "--weights", "none.safetensors"], "none.safetensors"),
        (["export", "--labels", "none.txt"], "none.txt"),
        (["export", "--recipe", "none.toml"], "cannot read the recipe none.toml"),
        (["export", "nowhere.py:make", "--input", "1x3x8x8"], "there is no file nowhere.py"),
        (["export", "efficientvim_m1", "--input", "3x224x224"], "one input of 4 dimensions"),
        (["export", "dualtoken_vit_tiny", "--input", "1x3x100x100"], "error: DualToken-ViT takes heights and widths"),
        (["export", "--colour"], "No such option: --colour"),
        (["exprt"], "No such command 'exprt'"),
        (["verify"], "Missing argument"),
        (["verify", "nowhere.onnx"], "there is no artifact nowhere.onnx"),
        (["inspect", "afnet_t"], "unknown model 'afnet_t'; did you mean 'affnet_t'? Valid: "),
        (["verify", "net.rtx.engine"], "is an engine; give the file that it was built from, net.rtx.onnx"),
        (["inspect", "net.rtx.engine"], "is an engine; give the file that it was built from, net.rtx.onnx"),
        (["inspect", "nowhere.onnx"], "there is no artifact nowhere.onnx"),
        (["inspect", "nowhere.tflite"], "there is no artifact nowhere.tflite"),
        (["inspect", "nowhere.onnx", "--input", "1x3x8x8"], "nowhere.onnx is an artifact, inspected as it is"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(command, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert code == 2
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_target_whose_libraries_are_missing_names_its_extra(command, tmp_path, monkeypatch):
    monkeypatch.setitem(targets.EXTRAS, "tensorrt-rtx", {"nowhere_to_be_found": "tensorrt-rtx-cu13-bindings"})
    code, out, err = command("export", "-t", "tensorrt-rtx", "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err == (
        "error: the target tensorrt-rtx needs tensorrt-rtx-cu13-bindings, which is not installed; "
        "pip install 'mobilemix[tensorrt-rtx]'\n"
    )


def test_tensorrt_without_a_gpu_says_what_was_not_checked(command, network, tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "can_build", lambda flavour: "no NVIDIA driver")
    export = ("export", network, "-t", "onnx,tensorrt", "--workspace", 64, "--input", SHAPE, "-o", tmp_path)
    code, out, _ = command(*export)
    assert code == 0
    assert [
        line.split(" · ")[0] for line in out.splitlines() if line.startswith(("verified", "engine", "not run"))
    ] == [
        f"verified {tmp_path / 'make.onnx'}",
        "not run TensorRT engine: neither parsed by TensorRT nor built: no NVIDIA driver; to check it, export again on "
        "a machine that can build, or run trtexec --onnx=make.tensorrt.onnx --saveEngine=make.tensorrt.engine "
        "--stronglyTyped --noTF32 --skipInference --memPoolSize=workspace:64",
        f"verified {tmp_path / 'make.tensorrt.onnx'}",
    ]
    code, out, _ = command("verify", tmp_path / "make.tensorrt.onnx")
    assert code == 0
    assert "not run TensorRT engine" in out
    code, out, _ = command(*export, "--json")
    assert code == 0
    builds = [one["manifest"]["build"] for one in json.loads(out)]
    assert builds == [{}, {"files": {}, "reason": "no NVIDIA driver"}]
    code, out, _ = command("inspect", tmp_path / "make.tensorrt.onnx")
    assert code == 0
    assert "nothing in it is known to stop a runtime" in out


@pytest.mark.skipif(bool(builder.can_build("tensorrt-rtx")), reason="needs pip install 'mobilemix[tensorrt-rtx]'")
def test_an_engine_has_a_line_of_its_own(command, network, tmp_path):
    code, out, _ = command("export", network, "-t", "tensorrt-rtx", "--input", SHAPE, "-o", tmp_path)
    assert code == 0
    *_, line = out.splitlines()
    assert line.startswith(f"engine {tmp_path / 'make.rtx.engine'} · ")
    assert " MB · " in line
    assert "TensorRT for RTX 1." in line
    assert "no GPU: built ahead of time · layers: " in line
    assert command("verify", tmp_path / "make.rtx.onnx")[0] == 0


def test_what_tensorrt_does_not_take_is_one_line(command, tmp_path):
    (tmp_path / "bits.py").write_text(
        "from torch import nn\n\n"
        "class Bits(nn.Module):\n"
        "    def forward(self, image):\n"
        "        return (image.int() & 3).float()\n"
    )
    model = f"{tmp_path / 'bits.py'}:Bits"
    code, out, err = command("export", model, "-t", "tensorrt", "--input", "1x4", "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    (line,) = err.strip().splitlines()
    assert "TensorRT does not take BitwiseAnd at" in line
    assert "bits.py:5 (return (image.int() & 3).float())" in line
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["-t", "litert"], ["-t", "onnx,litert"], ["-t", "litert", "--precision", "int8"]]
)
def test_a_target_that_is_not_installed_costs_no_wait(command, tmp_path, monkeypatch, arguments):
    monkeypatch.setitem(targets.EXTRAS, "litert", {"nowhere_to_be_found": "litert-torch"})
    monkeypatch.setattr(api, "prepare", lambda *_, **__: pytest.fail("the model was loaded"))
    code, out, err = command("export", *arguments, "-o", tmp_path / "out")
    assert (code, out) == (2, "")
    assert err == (
        "error: the target litert needs litert-torch, which is not installed; pip install 'mobilemix[litert]'\n"
    )
    assert not (tmp_path / "out").exists()


def test_litert_beside_another_target(command, network, tmp_path):
    pytest.importorskip("litert_torch", reason="needs pip install 'mobilemix[litert]'")
    code, out, err = command("export", network, "-t", "onnx,litert", "--input", SHAPE, "-o", tmp_path)
    assert code == 0
    assert [line.split(" · ")[0] for line in out.splitlines() if line.startswith("verified")] == [
        f"verified {tmp_path / 'make.onnx'}",
        f"verified {tmp_path / 'make.tflite'}",
    ]
    assert err.strip() in ("", "note: make has random weights; give a checkpoint with --weights")
    assert command("verify", tmp_path / "make.tflite")[0] == 0
    code, out, _ = command("inspect", tmp_path / "make.tflite")
    assert code == 0
    assert "LiteRT (TFLite schema 3)" in out
    (tmp_path / "cut.tflite").write_bytes((tmp_path / "make.tflite").read_bytes()[:5000])
    code, out, err = command("inspect", tmp_path / "cut.tflite")
    assert (code, out) == (2, "")
    (line,) = (line for line in err.splitlines() if line.strip())
    assert line.startswith("error: ")
    assert "cut.tflite is not a valid LiteRT model" in line


def test_debug_shows_the_traceback(tmp_path):
    run = subprocess.run([*COMMAND, "export", "afnet_t", "--debug"], cwd=tmp_path, capture_output=True, text=True)
    assert "Traceback" in run.stderr


def test_an_output_folder_that_is_a_file(command, network, tmp_path):
    (tmp_path / "out").write_text("a file")
    code, _, err = command("export", network, "-t", "onnx", "--input", SHAPE, "-o", tmp_path / "out")
    assert code == 2
    assert "cannot write to" in err


def test_version_and_help(command):
    assert command("--version")[:2] == (0, "mobilemix 0.1.0\n")
    assert "export" in command("--help")[1]
    assert "export" in command()[1]


ENDING = """
import atexit, sys, threading, time
from mobilemix import cli

class Kept:
    def __del__(self):
        print("taken apart")

kept = Kept()
later = threading.Thread(target=lambda: (time.sleep(0.2), print("thread")))
atexit.register(lambda: print("exit function"))
later.start()
sys.argv = ["mobilemix", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["export", "-t", "corml"], 2)])
def test_the_process_ends_in_order_and_is_not_taken_apart(arguments, code):
    run = subprocess.run([sys.executable, "-c", ENDING, *arguments], stdout=subprocess.PIPE)
    assert run.returncode == code
    said = ["mobilemix 0.1.0"] if code == 0 else []
    assert sorted(run.stdout.decode().splitlines()) == sorted([*said, "thread", "exit function"])
    assert run.stdout.endswith(b"exit function\n")


def test_standard_output_that_fails_at_the_end_is_told_as_python_tells_it():
    ending = (
        "import sys\nfrom mobilemix import cli\nprint('late', end='')\nsys.argv = ['mobilemix', 'exprt']\ncli.main()"
    )
    with Path("/dev/full").open("w") as full:
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        run = subprocess.run(
            [sys.executable, "-c", ending], stdout=full, stderr=subprocess.PIPE, text=True, env=buffered
        )
    assert run.returncode == 120
    assert "error: No such command" in run.stderr
    assert "OSError" in run.stderr


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_the_older_artifact_and_nothing_half_made(command, network, tmp_path, stop):
    out = tmp_path / "out"
    out.mkdir()
    older = {"make.onnx": "the older artifact", "make.onnx.manifest.json": "and its manifest"}
    for name, text in older.items():
        (out / name).write_text(text)
    arguments = ["export", network, "-t", "onnx", "--input", SHAPE, "-o", str(out)]
    run = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob(".mobilemix-*")) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    run.send_signal(stop)
    _, err = run.communicate(timeout=60)

    left = {path.name: path.read_text() for path in out.iterdir() if path.is_file()}
    assert left == older
    if stop != signal.SIGKILL:
        assert run.returncode == 2
        assert err.splitlines()[-1] == "error: interrupted; nothing was written"
        assert len(list(out.iterdir())) == len(older)
        return
    # Nothing runs when a process is killed; what it left is gone after the next run.
    assert len(list(out.iterdir())) == len(older) + 1
    assert command(*arguments)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == sorted(older)
