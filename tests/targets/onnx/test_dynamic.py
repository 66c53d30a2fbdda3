import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from mobilemix.errors import InputError
from mobilemix.parity import relative_l2
from mobilemix.quantization.options import Quantization
from mobilemix.recipe import Recipe
from mobilemix.targets.onnx import OnnxTarget, checks
from mobilemix.targets.onnx.dynamic import in_float, layers, quantize
from mobilemix.targets.onnx.runtime import OnnxRunner

TOKENS = (1, 32, 6, 6)
DEFAULT = Quantization()
ERRORS = (1e-3, 5e-2)
"""Least and largest relative L2 error of a few layers; less, and nothing was rounded."""
FORMATS = ("u8s8", "u8u8", "u8s7")


class Tokens(nn.Module):
    """A convolution, and matrices with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(32, 48, 1)
        self.mix, self.out, self.head = nn.Linear(48, 64, bias=False), nn.Linear(64, 48), nn.Linear(48, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.out(nn.functional.gelu(self.mix(x)))
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("full") / "model.onnx"
    lowered = onnx_cases.lower(Tokens().eval(), torch.randn(TOKENS))
    lowered = dataclasses.replace(lowered, input_names=("x",), output_names=("y",))
    OnnxTarget().compile(lowered, Recipe(target="onnx", opset=18), path)
    return path


def made(full: Path, folder: Path, options: Quantization = DEFAULT) -> Path:
    path = folder / "dynamic.onnx"
    quantize(full, path, [], options)
    onnx.checker.check_model(path, full_check=True)
    return path


@pytest.mark.parametrize("form", FORMATS)
def test_results_are_those_of_eight_bits(full: Path, tmp_path: Path, form: str) -> None:
    generator = np.random.default_rng(0)
    runners = [OnnxRunner(path) for path in (made(full, tmp_path, Quantization(format=form)), full)]
    errors = []
    for size in (1.0, 100.0):  # whatever the range of an input
        sample = {"x": np.float32(size) * generator.standard_normal(TOKENS, np.float32)}
        errors.append(relative_l2(*(runner.run(sample)["y"] for runner in runners)))
    least, largest = ERRORS
    assert least < max(errors) < largest


def test_matrix_products_are_integer_kernels_and_convolutions_are_not(full: Path, tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "fused.onnx"), 4
    path = made(full, tmp_path)
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    operators = Counter(node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node)
    plain = Counter(node.op_type for node in onnx.load(path).graph.node)
    products = sum(
        count for name, count in operators.items() if name in ("DynamicQuantizeMatMul", "MatMulIntegerToFloat")
    )
    assert products == plain["MatMulInteger"] >= 3
    assert not {"MatMul", "Gemm", "MatMulInteger", "ConvInteger"} & operators.keys()


@pytest.mark.parametrize("form", FORMATS)
def test_the_file_is_the_float_one_rounded(full: Path, tmp_path: Path, form: str) -> None:
    model = ir.load(made(full, tmp_path, Quantization(format=form)))
    in_float(model)
    assert checks.first_difference(onnx.load(full), ir.to_proto(model)) is None
    assert checks.first_float(layers(ir.load(full).graph, DEFAULT), model, weights_only=True) is None


def test_a_scale_of_another_activation_is_found(full: Path, tmp_path: Path) -> None:
    model = onnx.load(made(full, tmp_path))
    roundings = [node for node in model.graph.node if node.op_type == "DynamicQuantizeLinear"]
    product = next(node for node in model.graph.node if roundings[1].output[1] in node.input)
    product.input[0] = roundings[0].output[1]
    changed = ir.from_proto(model)
    in_float(changed)
    assert checks.first_difference(onnx.load(full), ir.to_proto(changed)) is not None


def test_patterns_leave_layers_in_float(full: Path, tmp_path: Path) -> None:
    path = made(full, tmp_path, Quantization(layers=(("head", "float"),)))
    found = [node for node in onnx.load(path).graph.node if node.op_type in ("Gemm", "MatMul", "Conv")]
    assert [node.name.partition("/")[0] for node in found] == ["embed", "head"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Quantization(format="s8s8"), "makes unsigned integers, not those of s8s8; use u8s8"),
        (Quantization(bias_correction=True), "biases of int8-dynamic are not corrected"),
    ],
)
def test_what_it_has_not_is_said(full: Path, tmp_path: Path, options: Quantization, message: str) -> None:
    with pytest.raises(InputError, match=message):
        quantize(full, tmp_path / "dynamic.onnx", [], options)
