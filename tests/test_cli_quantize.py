"""`mobilemix quantize`, on a network of which one layer has weights that 8 bits cannot hold."""

import json
from pathlib import Path

import numpy as np
import pytest

import mobilemix
from mobilemix import cli
from mobilemix.errors import InputError, UnknownNameError

NETWORK = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, largest):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem, self.wide = nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.narrow, self.last, self.head = nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 4, 1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            self.wide.weight[0], self.wide.bias[0] = 0, 0
            self.narrow.weight[:, 0] = largest

    def forward(self, image):
        for layer in (self.stem, self.wide, self.narrow, self.last):
            image = torch.relu(layer(image))
        return self.head(image)


def spoiled():
    return Net(200.0)  # in `narrow` there are weights that dwarf the others, for a channel that is always 0


def classifier():
    return nn.Sequential(Net(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""
SHAPE = "1x3x16x16"
SAMPLES = 24
SPOILED = "narrow"
LIMIT = "0.001"
"""Of the mean cosine's loss, which is a tenth and more where `SPOILED` is quantised."""


@pytest.fixture
def network(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(NETWORK)
    return f"{tmp_path}/net.py:spoiled"


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    path = tmp_path / "pixels.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (SAMPLES, 3, 16, 16), dtype=np.uint8))
    return path


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_the_spoiled_layer_stays_in_float_and_the_recipe_makes_the_same_file(
    command, network, pixels, tmp_path, target
):
    out = tmp_path / "out"
    ios = ["--minimum-ios", "17"] if target == "coreml" else []
    options = ["--input", f"tensor:{SHAPE}", "--calibration", pixels, *ios]
    code, text, _ = command("quantize", network, "-t", target, *options, "--max-drop", LIMIT, "-o", out, "--json")
    assert code == 0
    found = json.loads(text)
    report = found["report"]
    modules = {one["layer"]["name"]: one["layer"]["module"] for one in report["sensitivities"]}
    kept = report["choice"]["chosen"]["kept"]
    assert [modules[name] for name in kept] == [SPOILED]
    assert len(modules) > 2
    drifts = {one["layer"]["module"]: one["drift"]["relative_l2"] for one in report["sensitivities"]}
    assert max(drifts, key=drifts.get) == SPOILED
    assert (report["measure"], report["samples"], report["precision"]) == ("cosine", SAMPLES, "int8")
    assert report["choice"]["trials"][0]["drop"] > float(LIMIT) > report["choice"]["chosen"]["drop"]
    assert found["manifest"]["recipe"]["quantization"]["layers"] == [[name, "float"] for name in kept]

    artifact, recipe = Path(found["path"]), Path(found["recipe"])
    assert recipe.name == f"spoiled.{target}.toml"
    code, _, _ = command("export", "--recipe", recipe, "-o", tmp_path / "again")
    assert code == 0
    again = tmp_path / "again" / artifact.name
    files = [each.relative_to(artifact) for each in sorted(artifact.rglob("*")) if each.is_file()] or [Path()]
    for file in files:
        if file.name != "Manifest.json":  # whose identifiers are new ones each time
            assert (again / file).read_bytes() == (artifact / file).read_bytes(), file


def test_tables_and_the_closing_lines(command, network, pixels, tmp_path):
    labels = np.arange(SAMPLES) % 4
    np.savez(tmp_path / "data.npz", input=np.load(pixels), labels=labels)
    options = ["--input", f"tensor:{SHAPE}", "--calibration", pixels, "--data", tmp_path / "data.npz"]
    code, text, _ = command(
        "quantize", network.replace("spoiled", "classifier"), *options, "--max-drop", "90%", "-o", tmp_path / "out"
    )
    assert code == 0
    lines = text.splitlines()
    assert lines[0].split("  ")[0] == "configuration"
    assert "top-1" in lines[0]
    assert lines[2].startswith("all int8")
    assert "mixed" not in text
    assert "classifier.onnx" in lines[-2]
    assert lines[-1].startswith(f"recipe {tmp_path / 'out' / 'classifier.onnx.toml'}")
    layers = (tmp_path / "out" / "classifier.onnx.toml").read_text()
    assert "[quantization.layers]" not in layers


def test_python_gets_the_same_things(network, pixels, tmp_path):
    found = mobilemix.quantize(
        network,
        output=tmp_path,
        input_shapes=((1, 3, 16, 16),),
        input="tensor",
        calibration=np.load(pixels),
        objective="size",
        max_drop=float(LIMIT),
    )
    assert isinstance(found, mobilemix.Quantized)
    assert found.export.path == tmp_path / "spoiled.onnx"
    assert found.recipe.exists()
    assert [name.partition("/")[0] for name in found.report.choice.chosen.kept] == [SPOILED]
    if found.page is not None:
        assert f"{SPOILED}/" in found.page.read_text()


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"objective": "sise"}, UnknownNameError, "did you mean 'size'"),
        ({"max_drop": 1.5}, InputError, "0.005 is half a percent"),
        ({"precision": "fp32"}, UnknownNameError, "precision to mix with float 'fp32'"),
        ({"target": "litert"}, InputError, "for coreml and onnx"),
    ],
)
def test_what_cannot_be_done_is_said(network, tmp_path, monkeypatch, fields, error, message):
    monkeypatch.setattr("mobilemix.api.require", lambda target: None)
    with pytest.raises(error, match=message):
        mobilemix.quantize(network, input_shapes=((1, 3, 16, 16),), output=tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "share"), [("0.5%", 0.005), ("0.005", 0.005), ("0", 0.0), ("2 %", 0.02)])
def test_shares(text, share):
    assert cli._share_of(text) == pytest.approx(share)


def test_what_is_no_share_is_said(command, network):
    code, _, err = command("quantize", network, "--max-drop", "little")
    assert code == 2
    assert err == "error: --max-drop cannot be 'little'; give a share such as 0.5% or 0.005\n"
