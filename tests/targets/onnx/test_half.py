import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from mobilemix.errors import InputError
from mobilemix.parity import relative_l2
from mobilemix.recipe import LEAST_OPSETS, Recipe
from mobilemix.targets.base import Lowered
from mobilemix.targets.onnx import OnnxTarget, checks
from mobilemix.targets.onnx.half import WIDE_OPERATORS, halve, to_half

RECIPE = Recipe(target="onnx", precision="fp16")
BFLOAT16 = Recipe(target="onnx", precision="bf16")
COARSER = (4, 16)
"""bfloat16 has 8 bits of significand, float16 has 11."""

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


@pytest.fixture(scope="module")
def brain(lowered: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("brain") / "small.onnx"
    OnnxTarget().compile(lowered, BFLOAT16, path)
    return path


def test_bfloat16_has_the_arithmetic_and_float32_the_sums(brain: Path) -> None:
    model = onnx.load(brain)
    known = types(model)
    assert known["image"] == known["logits"] == TensorProto.FLOAT
    (opset,) = (entry.version for entry in model.opset_import)
    assert opset == LEAST_OPSETS["bf16"]
    for node in model.graph.node:
        floats = {known[name] for name in (*node.input, *node.output)} - {TensorProto.INT64}
        if node.op_type in ("Conv", "MatMul", "Gemm", "LayerNormalization"):
            assert floats == {TensorProto.BFLOAT16}, node.name
        if node.op_type in (*WIDE_OPERATORS, "HardSwish"):  # which NVIDIA's parser has no bfloat16 for
            assert floats == {TensorProto.FLOAT}, node.name


def test_bfloat16_is_as_much_coarser_as_it_has_fewer_bits(
    halved: Path, brain: Path, twin: Path, sample: dict[str, np.ndarray]
) -> None:
    expected = OnnxTarget().load(twin).run(sample)["logits"]
    fine, coarse = (relative_l2(OnnxTarget().load(path).run(sample)["logits"], expected) for path in (halved, brain))
    least, largest = COARSER
    assert least < coarse / fine < largest


def test_every_value_that_is_bfloat16_is_rounded_to_it(brain: Path, sample: dict[str, np.ndarray]) -> None:
    known = types(onnx.load(brain))
    narrow = {
        name: value
        for name, value in OnnxTarget().load(brain).values(sample)
        if known.get(name) == TensorProto.BFLOAT16
    }
    assert len(narrow) > 20
    for name, value in narrow.items():
        assert np.array_equal(value, value.astype(ir.DataType.BFLOAT16.numpy()).astype(np.float32)), name


def test_bfloat16_files_are_checked_to_be_the_rounded_twin(
    brain: Path, lowered: Lowered, sample: dict[str, np.ndarray]
) -> None:
    found = checks.rounding(lowered, BFLOAT16, brain, [sample])
    assert [check.name for check in found] == ["float32 twin against PyTorch", "bf16 file is the twin, rounded"]
    assert all(check.passed for check in found), found


def test_what_the_opset_has_no_bfloat16_for_stays_float32(twin: Path) -> None:
    model = ir.load(twin)
    halve(model, ir.DataType.BFLOAT16)
    assert {node.outputs[0].dtype for node in model.graph if node.op_type == "Conv"} == {ir.DataType.FLOAT}
    assert {node.outputs[0].dtype for node in model.graph if node.op_type == "Gemm"} == {ir.DataType.BFLOAT16}


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_bounds_stay_finite(dtype: ir.DataType) -> None:
    bounds = np.array([np.finfo(np.float32).min, np.finfo(np.float32).max, np.inf, 0.1], np.float32)
    rounded = to_half(bounds, dtype).astype(np.float32)
    assert np.isfinite(rounded).tolist() == [True, True, False, True]
    assert 0 < abs(rounded[3] - bounds[3]) < 1e-3


def test_an_opset_without_the_precision_is_refused(lowered: Lowered, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bf16 needs opset 22, not 20"):
        OnnxTarget().compile(lowered, dataclasses.replace(BFLOAT16, opset=20), tmp_path / "old.onnx")
