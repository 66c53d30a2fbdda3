import dataclasses
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
from conftest import NETWORK
from torch import nn

import mobilemix
from mobilemix import files
from mobilemix.errors import InputError, MobilemixError, UnknownNameError
from mobilemix.manifest import dumps, manifest_path, read_manifest
from mobilemix.passes.complex_to_real import rules

SHAPES = ((1, 3, 16, 16),)
TARGETS = [("onnx", "fp32"), ("coreml", "fp32"), ("coreml", "fp16")]


@pytest.mark.parametrize(("target", "precision"), TARGETS)
def test_an_fft_network_of_the_users_arrives_intact(network, tmp_path, target, precision):
    out = tmp_path / "out"
    result = mobilemix.export(network, target=target, precision=precision, input_shapes=SHAPES, output=out)
    assert result.parity.passed
    assert result.parity.reference == "float64"
    assert set(result.parity.agreement) == {"noise", "photographs"}
    assert result.path.exists()
    assert result.path.parent == out
    assert sorted(path.name for path in out.iterdir()) == sorted([result.path.name, manifest_path(result.path).name])


@pytest.mark.parametrize("target", ["onnx", "coreml"])
def test_the_manifest_tells_the_whole_story(network, tmp_path, target):
    result = mobilemix.export(network, target=target, input_shapes=SHAPES, output=tmp_path)
    manifest = read_manifest(result.path)
    assert manifest.recipe.model == network
    assert manifest.recipe.precision in ("fp16", "fp32")
    assert manifest.recipe.input == ("image" if target == "coreml" else "tensor")
    assert manifest.provenance["inputs"] == {"image": {"shape": [1, 3, 16, 16], "dtype": "float32"}}
    assert manifest.provenance["outputs"] == {"logits": {"shape": [1, 4], "dtype": "float32"}}
    assert len(manifest.provenance["model"]["weights_sha256"]) == 64
    assert "complex_to_real" in manifest.provenance["passes"]
    assert manifest.provenance["versions"]["torch"] == torch.__version__
    assert manifest.artifact["sha256"] == files.sha256(result.path)
    assert manifest.artifact["bytes"] == files.size(result.path)
    assert sum(manifest.artifact["operators"].values()) > 5
    assert manifest.parity["passed"] is True
    assert manifest.parity["agreement"]["noise"]["relative_l2"] > 0
    assert set(manifest.seconds) == {"load", "capture", "rewrite", "compile", "verify"}


def test_the_provenance_is_inside_the_artifact(network, tmp_path):
    result = mobilemix.export(network, target="onnx", input_shapes=SHAPES, output=tmp_path)
    inside = {entry.key: entry.value for entry in onnx.load(result.path).metadata_props}
    assert json.loads(inside["mobilemix.provenance"])["model"] == result.manifest.provenance["model"]


def test_the_same_inputs_give_the_same_onnx_bytes(network, tmp_path):
    hashes = {
        mobilemix.export(network, target="onnx", input_shapes=SHAPES, output=tmp_path / name).manifest.artifact[
            "sha256"
        ]
        for name in ("one", "two")
    }
    assert len(hashes) == 1


def test_a_module_in_hand(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    result = mobilemix.export(module, target="onnx", input_shapes=SHAPES, output=tmp_path)
    assert result.path.name == "Sequential.onnx"
    assert mobilemix.verify(result.path, model=module).passed
    with pytest.raises(UnknownNameError, match="Sequential"):
        mobilemix.verify(result.path)


def test_several_inputs_and_outputs(tmp_path):
    class Two(nn.Module):
        def forward(self, left, right):
            return {"sum": left + right, "product": left * right}

    result = mobilemix.export(Two(), target="onnx", input_shapes=((2, 3), (1, 3)), output=tmp_path)
    assert result.parity.passed
    assert {name: value["shape"] for name, value in result.manifest.provenance["inputs"].items()} == {
        "left": (2, 3),
        "right": (1, 3),
    }
    assert set(result.manifest.provenance["outputs"]) == {"output_0", "output_1"}


@pytest.fixture
def exported(network, tmp_path):
    return mobilemix.export(network, target="onnx", input_shapes=SHAPES, output=tmp_path)


def test_verify_agrees_with_export(exported):
    parity = mobilemix.verify(exported.path)
    assert parity.passed
    assert {check.name for check in parity.checks} >= {"unchanged", "weights"}


def test_verify_notices_other_weights(exported, network, tmp_path):
    (tmp_path / "spectral_net.py").write_text(NETWORK.replace("* 0.4", "* 0.41"))
    parity = mobilemix.verify(exported.path)
    assert not parity.passed
    assert {check.name: check.passed for check in parity.checks}["weights"] is False


def test_verify_notices_a_changed_artifact_and_names_where(exported):
    model = onnx.load(exported.path)
    (weight,) = [tensor for tensor in model.graph.initializer if tensor.name.startswith("stem")][:1]
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] += 0.5
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(model, exported.path)
    parity = mobilemix.verify(exported.path)
    assert not parity.passed
    assert parity.departs is not None
    assert "relative error" in parity.departs
    assert {check.name: check.passed for check in parity.checks}["unchanged"] is False


def test_verify_without_a_manifest_or_artifact_is_one_clear_line(exported):
    with pytest.raises(InputError, match="there is no artifact"):
        mobilemix.verify("nowhere.onnx")
    manifest_path(exported.path).unlink()
    with pytest.raises(InputError, match="there is no manifest"):
        mobilemix.verify(exported.path)


def test_a_failed_verification_keeps_the_older_artifact_and_sets_the_new_one_aside(exported, network):
    before = files.sha256(exported.path)
    result = mobilemix.export(
        network, target="onnx", input_shapes=SHAPES, output=exported.path.parent, opset=20, tolerance=1e-12
    )
    assert not result.parity.passed
    assert result.path == exported.path.parent / "failed" / exported.path.name
    assert manifest_path(result.path).exists()
    assert files.sha256(exported.path) == before


def test_a_pass_that_changes_the_function_is_told_from_a_target_that_does(network, tmp_path, monkeypatch):
    from mobilemix import api

    lower = api.lower

    def spoilt(program, *args, **options):
        lowered = lower(program, *args, **options)
        lowered.state_dict["head.bias"] = nn.Parameter(lowered.state_dict["head.bias"] + 1)
        return lowered

    monkeypatch.setattr(api, "lower", spoilt)
    result = mobilemix.export(network, target="onnx", input_shapes=SHAPES, output=tmp_path)
    assert not result.parity.passed
    assert "the capture or a pass" in (result.parity.departs or "")


def test_the_size_budget_decides_too(network, tmp_path):
    options = {"target": "onnx", "input_shapes": SHAPES, "output": tmp_path}
    assert mobilemix.export(network, max_size_mb=1, **options).parity.passed
    assert not mobilemix.export(network, max_size_mb=1e-6, **options).parity.passed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "onx"}, "did you mean 'onnx'"),
        ({"target": "onnx", "precision": "fp8"}, "unknown precision"),
        ({"target": "onnx", "input": "image"}, "takes tensors; use --input tensor"),
        ({"target": "coreml", "input": "image", "input_shapes": ((2, 3, 16, 16),)}, "use --input tensor"),
        ({"target": "onnx", "input_shapes": ((1, 3, 16),)}, "could not capture the model"),
        ({"target": "onnx", "input_shapes": ((1, 5, 16, 16),)}, "channels"),
    ],
)
def test_what_cannot_be_exported_is_one_clear_line_and_leaves_nothing(network, tmp_path, options, message):
    out = tmp_path / "out"
    with pytest.raises(MobilemixError, match=message):
        mobilemix.export(network, **{"input_shapes": SHAPES, "output": out, **options})
    assert not out.exists() or not list(out.iterdir())


def test_photographs_are_only_for_images(tmp_path):
    result = mobilemix.export(nn.Linear(3, 2), target="onnx", input_shapes=((4, 3),), output=tmp_path)
    assert set(result.parity.agreement) == {"noise"}


def test_labels_of_the_wrong_number_are_refused(network, tmp_path):
    labels = tmp_path / "labels.txt"
    labels.write_text("a\nb\nc\n")
    with pytest.raises(InputError, match="3"):
        mobilemix.export(network, target="onnx", input_shapes=SHAPES, output=tmp_path, labels=labels)


def test_what_is_compared_can_fail(network, tmp_path, monkeypatch):
    """The reference is the source: a target that answers with noise must not pass."""
    from mobilemix.targets.onnx.runtime import OnnxRunner

    run = OnnxRunner.run
    monkeypatch.setattr(
        OnnxRunner, "run", lambda self, inputs: {k: np.sin(9 * v) for k, v in run(self, inputs).items()}
    )
    result = mobilemix.export(network, target="onnx", input_shapes=SHAPES, output=tmp_path)
    assert not result.parity.passed


def test_a_stage_listener_hears_every_stage(network, tmp_path):
    heard = []
    mobilemix.export(network, target="onnx", input_shapes=SHAPES, output=tmp_path, listener=heard.append)
    assert heard == ["load", "capture", "rewrite", "compile", "verify"]


def test_the_core_ml_package_of_the_older_export_is_replaced_whole(network, tmp_path):
    options = {"target": "coreml", "input_shapes": SHAPES, "output": tmp_path}
    first = mobilemix.export(network, **options)
    (first.path / "stray").write_text("of the older export")
    second = mobilemix.export(network, **options)
    assert second.path == first.path
    assert not (second.path / "stray").exists()
    shutil.rmtree(second.path)


def test_exports_are_frozen(exported):
    with pytest.raises(dataclasses.FrozenInstanceError):
        exported.path = None


class Tokens(nn.Module):
    """Token ids, a mask of booleans and a complex spectrum."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = nn.Embedding(50, 8)
        self.words.weight.data = torch.randn(50, 8, generator=generator)
        self.filter = nn.Parameter(torch.randn(8, dtype=torch.complex64, generator=generator))

    def forward(self, ids, mask, spectrum):
        x = self.words(ids).masked_fill(~(mask & (ids > 5)).unsqueeze(-1), 0.0)
        z = torch.fft.fft2(x) * self.filter + spectrum
        return {"mixed": torch.fft.ifft2(z).real, "spectrum": z, "best": x.argmax(-1)}


@pytest.mark.parametrize(("target", "integers", "flags"), [("onnx", "int64", "bool"), ("coreml", "int32", "int32")])
def test_integer_boolean_and_complex_inputs_and_outputs(tmp_path, target, integers, flags):
    result = mobilemix.export(
        Tokens(),
        target=target,
        precision="fp32",
        input_shapes=((1, 6), (1, 6), (1, 6, 8)),
        input_dtypes=("int64", "bool", "complex64"),
        output=tmp_path,
    )
    assert result.parity.passed, result.parity
    provenance = json.loads(dumps(result.manifest.provenance))
    pairs = {"shape": [1, 6, 8, 2], "dtype": "float32", "source": "complex64", "last_axis": ["re", "im"]}

    def stated(dtype, source):
        return {"shape": [1, 6], "dtype": dtype} | ({} if dtype == source else {"source": source})

    assert provenance["inputs"] == {
        "ids": stated(integers, "int64"),
        "mask": stated(flags, "bool"),
        "spectrum": pairs,
    }
    assert provenance["outputs"] == {
        "output_0": {"shape": [1, 6, 8], "dtype": "float32"},
        "output_1": pairs,
        "output_2": stated(integers, "int64"),
    }
    assert mobilemix.read_manifest(result.path).recipe.input_dtypes == ("int64", "bool", "complex64")
    assert mobilemix.verify(result.path, model=Tokens()).passed


def test_an_artifact_whose_complex_output_has_its_parts_exchanged_would_be_seen(tmp_path, monkeypatch):
    class Spectrum(nn.Module):
        def forward(self, z):
            return torch.fft.fft(z)

    options = {"target": "onnx", "input_shapes": ((2, 8),), "input_dtypes": ("complex64",), "output": tmp_path}
    assert mobilemix.export(Spectrum(), **options).parity.passed
    monkeypatch.setattr(rules, "pairs", lambda z: rules.emit(z.edit, torch.ops.aten.stack.default, [z.im, z.re], -1))
    assert not mobilemix.export(Spectrum(), **options).parity.passed
