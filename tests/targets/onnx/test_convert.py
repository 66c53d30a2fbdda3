import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import onnxruntime as ort
import pytest
import torch
from torch import nn

import mobilemix
from mobilemix.errors import InputError, TargetError
from mobilemix.recipe import OPSETS, Recipe
from mobilemix.targets.onnx import OnnxTarget, convert

Compile = Callable[..., Path]


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset(compiled: Compile, opset: int) -> None:
    model = onnx.load(compiled(onnx_cases.SmallBackbone(), torch.randn(1, 3, 16, 16), opset=opset))
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
    assert model.ir_version == onnx.helper.find_min_ir_version_for(model.opset_import)
    assert not model.functions


def test_file_says_what_it_is(backbone_file: Path) -> None:
    model = onnx.load(backbone_file)
    found = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(found.pop("mean")) == [0.5, 0.4, 0.3]
    assert json.loads(found.pop("std")) == [0.25, 0.25, 0.2]
    assert json.loads(found.pop("labels")) == ["rosé", "tulip"]
    assert found == {"model": "blossom", "author": "the authors", "description": "Five flowers."}
    assert (model.producer_name, model.producer_version) == ("mobilemix", mobilemix.__version__)
    assert (model.graph.name, model.doc_string) == ("blossom", "Five flowers.")


def test_nodes_are_named_by_module_and_value(backbone_file: Path) -> None:
    graph = onnx.load(backbone_file).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert all(node.name.rsplit("/", 1)[-1] == node.output[0] for node in graph.node)
    kernels = {node.name.split("/")[0]: node.op_type for node in graph.node}
    assert kernels["attention.norm"] == "LayerNormalization"
    assert graph.node[-1].name == "head/logits"
    # What was put in for a value, here the transposition before a norm, belongs to the same module.
    (norm,) = (node for node in graph.node if node.op_type == "LayerNormalization" and node.name.startswith("norm/"))
    (before,) = (node for node in graph.node if norm.input[0] in node.output)
    assert before.name.startswith("norm/")


def test_every_shape_is_known(backbone_file: Path) -> None:
    graph = onnx.load(backbone_file).graph
    known = {value.name for value in (*graph.value_info, *graph.output)}
    assert {name for node in graph.node for name in node.output} <= known


def test_values_that_fusions_change_lose_their_names(compiled: Compile) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.factor = nn.Conv2d(2, 3, 1), nn.Parameter(torch.rand(3, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.conv(x) * self.factor).relu()

    path = compiled(Scaled(), torch.randn(1, 2, 4, 4))
    assert [node.op_type for node in onnx.load(path).graph.node] == ["Conv", "Relu"]
    assert [node.output[0] for node in onnx.load(path).graph.node] == ["conv2d.folded", "logits"]


def test_nothing_of_this_machine_is_in_the_file(backbone_file: Path) -> None:
    content = backbone_file.read_bytes()
    for trace in (str(Path.home()), str(Path(__file__).parent), str(Path(torch.__file__).parent), ".py", "pkg."):
        assert trace.encode() not in content


def test_bytes_are_the_same_in_every_process(backbone_file: Path, tmp_path: Path) -> None:
    code = "import onnx_cases, pathlib, sys; onnx_cases.compile_backbone(pathlib.Path(sys.argv[1]))"
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "small.onnx")], check=True, env=environment)
    assert (tmp_path / "small.onnx").read_bytes() == backbone_file.read_bytes()


def test_large_weights_lie_beside_the_file(compiled: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "EXTERNAL_DATA_BYTES", 1000)
    path = compiled(onnx_cases.SmallBackbone(), torch.randn(1, 3, 16, 16))
    assert sorted(file.name for file in path.parent.iterdir()) == ["small.data", "small.onnx"]
    sample = {"image": np.ones((1, 3, 16, 16), np.float32)}
    assert len(list(OnnxTarget().load(path).values(sample))) > 50
    ort.InferenceSession(path)
    (path.parent / "small.data").unlink()
    with pytest.raises(InputError, match=r"small\.data"):
        OnnxTarget().load(path)


def test_a_file_is_replaced(compiled: Compile) -> None:
    first = compiled(nn.ReLU(), torch.randn(3)).read_bytes()
    assert compiled(nn.Sigmoid(), torch.randn(3)).read_bytes() != first


def test_simplification_that_changes_results_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def change(source: str, output_path: str, **_: object) -> None:
        model = onnx.load(source)
        model.graph.node[0].op_type = "Abs"
        onnx.save(model, output_path)

    monkeypatch.setattr("onnxsim.simplify", change)
    with pytest.raises(TargetError, match=r"onnxsim changed output 'logits' by \d"):
        OnnxTarget().compile(onnx_cases.lower(nn.ReLU(), torch.randn(9)), Recipe(target="onnx"), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "part", ["nothing", "a weight", "an attribute", "an operator", "an opset", "weights beside it"]
)
def test_only_an_untouched_graph_is_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: str) -> None:
    def change(source: str, output_path: str, **_: object) -> None:
        model = onnx.load(source)
        if part == "a weight":
            weight = model.graph.initializer[0]
            weight.raw_data = weight.raw_data[:-1] + b"\x7f"
        elif part == "an attribute":
            (node,) = (node for node in model.graph.node if node.op_type == "LeakyRelu")
            node.attribute[0].f *= 2
        elif part == "an operator":
            model.graph.node[-1].op_type = "Abs"
        elif part == "an opset":
            model.opset_import[0].version += 1
        beside = (
            {"save_as_external_data": True, "location": "x.data", "size_threshold": 0}
            if part == "weights beside it"
            else {}
        )
        onnx.save(model, output_path, **beside)

    class WasRunError(Exception):
        pass

    def run(*_: object) -> None:
        raise WasRunError

    monkeypatch.setattr("onnxsim.simplify", change)
    monkeypatch.setattr(convert, "trace", run)
    lowered = onnx_cases.lower(nn.Sequential(nn.Conv2d(2, 3, 1), nn.LeakyReLU()), torch.randn(1, 2, 40, 40))
    with contextlib.nullcontext() if part == "nothing" else pytest.raises(WasRunError):
        OnnxTarget().compile(lowered, Recipe(target="onnx"), tmp_path / "a.onnx")


def test_failing_simplification_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("onnxsim.simplify", fail)
    with pytest.raises(TargetError, match=r"^onnxsim cannot simplify the graph: first$"):
        OnnxTarget().compile(onnx_cases.lower(nn.ReLU(), torch.randn(9)), Recipe(target="onnx"), tmp_path / "a.onnx")


def test_invalid_graph_is_refused(compiled: Compile) -> None:
    path = compiled(nn.ReLU(), torch.randn(9))
    model = onnx.load(path)
    model.graph.node[0].op_type = "Rectify"
    onnx.save(model, path)
    with pytest.raises(TargetError, match="ONNX checker"):
        convert.check(path)
