from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from mobilemix.parity import relative_l2
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Lowered
from mobilemix.targets.onnx import OnnxTarget, checks
from mobilemix.targets.onnx.half import WIDE_OPERATORS

RECIPE = Recipe(target="onnx", precision="fp16")
HALF_ROUNDING = 5e-3
"""Relative L2 of a dozen layers in float16."""


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    torch.manual_seed(0)
    return onnx_cases.lower(onnx_cases.SmallBackbone(), torch.randn(1, 3, 16, 16))


@pytest.fixture(scope="module")
def halved(lowered: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("half") / "small.onnx"
    OnnxTarget().compile(lowered, RECIPE, path)
    return path


@pytest.fixture(scope="module")
def twin(lowered: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "small.onnx"
    OnnxTarget().compile(lowered, Recipe(target="onnx"), path)
    return path


@pytest.fixture(scope="module")
def sample() -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(0).standard_normal((1, 3, 16, 16), np.float32)}


def types(model: onnx.ModelProto) -> dict[str, int]:
    described = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    return {value.name: value.type.tensor_type.elem_type for value in described} | {
        tensor.name: tensor.data_type for tensor in model.graph.initializer
    }


def test_arithmetic_is_float16_and_the_interface_float32(halved: Path) -> None:
    model = onnx.load(halved)
    known = types(model)
    assert known["image"] == known["logits"] == TensorProto.FLOAT
    for node in model.graph.node:
        if node.op_type in ("Conv", "MatMul", "Gemm", "Gelu", "LayerNormalization"):
            assert {known[name] for name in (*node.input, *node.output)} == {TensorProto.FLOAT16}, node.name


def test_sums_of_many_values_stay_float32(halved: Path) -> None:
    model = onnx.load(halved)
    known, wide = types(model), [node for node in model.graph.node if node.op_type in WIDE_OPERATORS]
    assert {"InstanceNormalization", "GlobalAveragePool", "Softmax"} <= {node.op_type for node in wide}
    assert all(known[name] != TensorProto.FLOAT16 for node in wide for name in (*node.input, *node.output))


def test_results_are_those_of_float16(halved: Path, lowered: Lowered, sample: dict[str, np.ndarray]) -> None:
    expected = lowered.program.module()(torch.from_numpy(sample["image"])).detach().numpy()
    error = relative_l2(OnnxTarget().load(halved).run(sample)["logits"], expected)
    assert 1e-6 < error < HALF_ROUNDING


def test_checks_pass(halved: Path, lowered: Lowered, sample: dict[str, np.ndarray]) -> None:
    found = OnnxTarget().checks(lowered, RECIPE, halved, [sample])
    assert len(found) == 6
    assert all(check.passed for check in found), found


def change_bit(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.startswith("head.weight"))
    content = numpy_helper.to_array(tensor).copy()
    content.view(np.uint16).flat[0] ^= 1
    tensor.CopyFrom(numpy_helper.from_array(content, tensor.name))


def change_operator(model: onnx.ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "HardSwish").op_type = "Relu"


def change_attribute(model: onnx.ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    next(attribute for attribute in node.attribute if attribute.name == "epsilon").f = 2e-5


def drop_last(model: onnx.ModelProto) -> None:
    del model.graph.node[-2:]


@pytest.mark.parametrize("fault", [change_bit, change_operator, change_attribute, drop_last])
def test_planted_faults_are_found(twin: Path, halved: Path, fault: Callable[[onnx.ModelProto], None]) -> None:
    full, half = onnx.load(twin), onnx.load(halved)
    assert checks.first_difference(full, half) is None
    fault(half)
    assert checks.first_difference(full, half) is not None


def test_values_beyond_the_range_are_found(tmp_path: Path) -> None:
    class Large(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 3e5).sigmoid()

    path = tmp_path / "large.onnx"
    lowered = onnx_cases.lower(Large(), torch.randn(4))
    OnnxTarget().compile(lowered, RECIPE, path)
    found = {
        check.name: check.passed for check in checks.rounding(lowered, RECIPE, path, [{"x": np.ones(4, np.float32)}])
    }
    assert [name for name, passed in found.items() if not passed] == ["float16 range"]


def test_masks_of_infinities_are_within_the_range(tmp_path: Path) -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.masked_fill(x > 0, -torch.inf).exp()

    path = tmp_path / "masked.onnx"
    lowered = onnx_cases.lower(Masked(), torch.randn(4))
    OnnxTarget().compile(lowered, RECIPE, path)
    found = checks.rounding(lowered, RECIPE, path, [{"x": np.array([-1, 2, -3, 4], np.float32)}])
    assert all(check.passed for check in found), found
