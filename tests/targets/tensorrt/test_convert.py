"""The ONNX file in NVIDIA's form, and what comes of building an engine of it."""

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import onnx_cases
import pytest
import torch
from tensorrt_graphs import needs_rtx
from torch import Tensor, nn

from mobilemix import api
from mobilemix.errors import InputError, TargetError, UnsupportedOpError
from mobilemix.recipe import Recipe
from mobilemix.targets.tensorrt import bindings, builder, convert
from mobilemix.targets.tensorrt.builder import BuildOptions, Built, Refusal, Refused

DETERMINANT = """
import torch
from torch import nn


class Gram(nn.Module):
    def forward(self, image):
        x = image.flatten(2)
        return torch.linalg.det(x @ x.transpose(1, 2))


def make():
    return Gram()
"""


def written(module: nn.Module, path: Path, *inputs: Tensor, precision: str = "fp32") -> list[onnx.NodeProto]:
    convert.write(onnx_cases.lower(module, *inputs), Recipe(target="tensorrt", precision=precision), path)
    return list(onnx.load(path).graph.node)


def test_channels_stay_as_many_as_they_are(tmp_path: Path) -> None:
    depthwise = onnx_cases.randomise(nn.Sequential(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 9, 3, groups=9)))
    nodes = written(depthwise, tmp_path / "m.onnx", torch.ones(1, 3, 8, 8))
    weights = {tensor.name: tuple(tensor.dims) for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert [weights[node.input[1]] for node in nodes] == [(9, 3, 1, 1), (9, 1, 3, 3)], "12 channels suit a CPU's layout"


def test_convolutions_of_flattened_images_are_convolutions_of_images(tmp_path: Path) -> None:
    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mix = nn.Conv2d(3, 8, 3), nn.Conv1d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.mix(self.first(x).flatten(2))

    nodes = written(onnx_cases.randomise(Flattened()), tmp_path / "m.onnx", torch.ones(1, 3, 6, 6))
    assert [node.op_type for node in nodes] == ["Conv", "Conv", "Reshape"]


def test_norms_are_the_layer_that_sums_in_float32(tmp_path: Path) -> None:
    nodes = written(onnx_cases.ChannelNorm(8), tmp_path / "m.onnx", torch.rand(1, 8, 4, 4), precision="fp16")
    assert "LayerNormalization" in [node.op_type for node in nodes]


def test_the_largest_elements_come_in_order(tmp_path: Path) -> None:
    class Largest(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.topk(x, 3, sorted=False).values

    (node,) = (each for each in written(Largest(), tmp_path / "m.onnx", torch.rand(1, 8)) if each.op_type == "TopK")
    assert "sorted" not in [attribute.name for attribute in node.attribute]


def test_values_have_the_type_that_they_are_computed_in(prepared: api.Prepared, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    convert.write(prepared.lowered, Recipe(target="tensorrt", precision="fp16"), path)
    model = onnx.load(path)
    assert [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)] == [1, 1]
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    (convolution,) = (node for node in model.graph.node if node.op_type == "Conv")
    assert {types[name] for name in convolution.input[1:]} == {onnx.TensorProto.FLOAT16}


def test_the_same_program_gives_the_same_bytes(prepared: api.Prepared, tmp_path: Path) -> None:
    recipe = Recipe(target="tensorrt", precision="fp16")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        convert.write(prepared.lowered, recipe, tmp_path / name / "m.onnx")
    assert (tmp_path / "one/m.onnx").read_bytes() == (tmp_path / "two/m.onnx").read_bytes()


def test_an_opset_that_the_parser_does_not_read_is_refused(prepared: api.Prepared, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="reads opsets up to 20, not 21"):
        convert.write(prepared.lowered, Recipe(target="tensorrt", precision="fp32", opset=21), tmp_path / "m.onnx")


def test_a_model_with_an_operator_that_the_parser_lacks_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "gram.py").write_text(DETERMINANT)
    out = tmp_path / "out"
    with pytest.raises(UnsupportedOpError, match=r"does not take Det at \S*gram\.py:9 \(return torch\.linalg\.det"):
        api.export(f"{tmp_path}/gram.py:make", target="tensorrt", input_shapes=((1, 3, 4, 4),), output=out)
    assert list(out.iterdir()) == []


def test_what_a_recipe_asks_of_the_builder(tmp_path: Path) -> None:
    assert convert.options_of(Recipe(target="tensorrt")) == BuildOptions()
    recipe = Recipe(
        target="tensorrt",
        workspace_mb=64,
        timing_cache=tmp_path / "cache",
        hardware_compatibility="ampere_plus",
        version_compatible=True,
    )
    assert convert.options_of(recipe) == BuildOptions(64, tmp_path / "cache", "ampere_plus", True)


def test_without_a_builder_the_manifest_says_why(
    prepared: api.Prepared, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "can_build", lambda flavour: "no NVIDIA driver")
    result = api.deploy(prepared, recipe, tmp_path)
    assert result.manifest.build == {"files": {}, "reason": "no NVIDIA driver"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "make.tensorrt.onnx",
        "make.tensorrt.onnx.manifest.json",
    ]


def build(model: Path, engine: Path, log: Path, flavour: str, options: BuildOptions) -> Built:
    """A builder that writes the bytes of an engine, as TensorRT's would."""
    engine.write_bytes(b"engine")
    log.write_text("log")
    layers = (
        builder.Layer("a", "conv", "fp16"),
        builder.Layer("b", "conv", "fp16"),
        builder.Layer("c", "cast", "fp32"),
    )
    return Built(engine, 1.25, 6, "TensorRT 10.9", layers)


@pytest.fixture
def with_builder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that can build, and not run."""
    monkeypatch.setattr(builder, "can_build", lambda flavour: None)
    monkeypatch.setattr(builder, "build", build)
    monkeypatch.setattr(bindings, "gpu_name", lambda: "NVIDIA H100")


@pytest.mark.usefixtures("with_builder")
def test_an_engine_stands_beside_the_file_and_in_its_manifest(
    prepared: api.Prepared, recipe: Recipe, tmp_path: Path
) -> None:
    asked = dataclasses.replace(recipe, workspace_mb=64)
    result = api.deploy(prepared, asked, tmp_path)
    assert (tmp_path / "make.tensorrt.engine").read_bytes() == b"engine"
    assert (tmp_path / "make.tensorrt.log").read_text() == "log"
    facts = dict(result.manifest.build)
    assert list(facts.pop("files")) == ["make.tensorrt.engine"]
    assert facts == {
        "log": "make.tensorrt.log",
        "bytes": 6,
        "seconds": 1.25,
        "builder": "TensorRT 10.9",
        "device": "NVIDIA H100",
        "options": {"workspace_mb": 64},
        "layers": {"fp16": 2, "fp32": 1},
    }


@pytest.mark.usefixtures("with_builder")
def test_the_engine_of_an_older_file_does_not_stay(
    prepared: api.Prepared, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.deploy(prepared, recipe, tmp_path)
    (tmp_path / "own.engine").touch()
    monkeypatch.setattr(builder, "can_build", lambda flavour: "no NVIDIA driver")
    api.deploy(prepared, dataclasses.replace(recipe, precision="fp32"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "make.tensorrt.onnx",
        "make.tensorrt.onnx.manifest.json",
        "own.engine",
    ]


@pytest.mark.usefixtures("with_builder")
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (TargetError("out of memory"), TargetError, "out of memory"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (
            Refused("TensorRT", (Refusal("gelu", "Erf", "no importer"),)),
            UnsupportedOpError,
            r"TensorRT does not take Erf at \S*spectral_net\.py:\d+ \(return self\.head\(nn\.functional\.gelu",
        ),
    ],
    ids=["builder", "interrupt", "parser"],
)
def test_a_build_that_fails_leaves_the_old_artifact(
    error: BaseException,
    kind: type[BaseException],
    message: str | None,
    prepared: api.Prepared,
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    api.deploy(prepared, recipe, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(model: Path, engine: Path, log: Path, *_: Any) -> Built:
        engine.write_bytes(b"half")
        log.write_text("errors")
        raise error

    monkeypatch.setattr(builder, "build", fail)
    with pytest.raises(kind, match=message):
        api.deploy(prepared, dataclasses.replace(recipe, precision="fp32"), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@needs_rtx
def test_tensorrt_for_rtx_builds_ahead_of_time(prepared: api.Prepared, recipe: Recipe, tmp_path: Path) -> None:
    result = api.deploy(prepared, dataclasses.replace(recipe, target="tensorrt-rtx"), tmp_path)
    assert result.parity.passed
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "make.rtx.engine",
        "make.rtx.log",
        "make.rtx.onnx",
        "make.rtx.onnx.manifest.json",
    ]
    facts = result.manifest.build
    assert facts["bytes"] == (tmp_path / "make.rtx.engine").stat().st_size > 10_000
    assert facts["builder"].startswith("TensorRT for RTX 1.")
    assert facts["device"] == "no GPU: built ahead of time"
    assert facts["layers"]["fp16"] > facts["layers"]["fp32"]
    assert result.manifest.provenance["versions"]["tensorrt-rtx-cu13-bindings"]
