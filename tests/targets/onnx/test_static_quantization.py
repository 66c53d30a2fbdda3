"""ONNX Runtime's own quantiser on what mobilemix writes: the rewrites leave it every weight that it would quantise."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx_cases
import onnx_ir as ir
import pytest
import torch
from models_checks import distinct
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from mobilemix.capture import capture
from mobilemix.models.registry import MODELS, build
from mobilemix.parity import relative_l2
from mobilemix.passes import SHARED, lower
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Lowered
from mobilemix.targets.onnx import OnnxTarget
from mobilemix.targets.onnx.convert import write
from mobilemix.targets.onnx.rewrites import END, START

SMALLEST = ("affnet_et", "casvit_xs", "efficientvim_m1", "dualtoken_vit_tiny")
INT8_ERROR = 0.25
"""Relative L2 to the float file, calibrated on the very sample; a wrong constant leaves more."""


class Product(NamedTuple):
    """One Conv, Gemm or MatMul."""

    multiply_adds: int
    has_weight: bool
    is_quantized: bool


class Once(CalibrationDataReader):
    """One sample of noise."""

    def __init__(self, path: Path):
        self.samples = iter([sample(path)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.samples, None)


def sample(path: Path) -> dict[str, np.ndarray]:
    (value,) = ir.load(path).graph.inputs
    return {value.name: np.random.default_rng(0).standard_normal(tuple(map(int, value.shape)), np.float32)}


def quantized(path: Path) -> Path:
    """The same with 8-bit weights by channel and 8-bit activations, between QuantizeLinear and DequantizeLinear."""
    result = path.with_suffix(".int8.onnx")
    int8 = {"activation_type": QuantType.QInt8, "weight_type": QuantType.QInt8}
    quantize_static(path, result, Once(path), quant_format=QuantFormat.QDQ, per_channel=True, **int8)
    return result


def products(path: Path, int8: Path) -> dict[str, Product]:
    """Those of a float file by name, and what became of them."""
    after = {node.name: node for node in ir.load(int8).graph}
    found = {}
    for node in ir.load(path).graph:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            operands = node.inputs[:2]
            dequantized = [
                value.producer() is not None and value.producer().op_type == "DequantizeLinear"
                for value in after[node.name].inputs[:2]
            ]
            has_weight = any(value.is_initializer() for value in operands)
            found[node.name] = Product(_multiply_adds(node), has_weight, all(dequantized))
    return found


def _multiply_adds(node: ir.Node) -> int:
    left, right = ([int(size) for size in value.shape] for value in node.inputs[:2])
    if node.op_type == "Conv":
        summed = math.prod(right[1:])
    else:
        summed = left[0] if node.attributes.get_int("transA", 0) else left[-1]
    return math.prod(map(int, node.outputs[0].shape)) * summed


def assert_as_quantized_as_plain(lowered: Lowered, folder: Path) -> None:
    """Hold the file that mobilemix writes against the one without rewrites."""
    recipe = Recipe(target="onnx", opset=18)
    ours, plain = (folder / f"{name}.onnx" for name in ("ours", "plain"))
    write(lowered, recipe, ours)
    write(lowered, recipe, plain, (*START, *END))
    int8 = quantized(ours)
    found, reference = products(ours, int8), products(plain, quantized(plain))
    assert not [name for name, product in found.items() if product.has_weight and not product.is_quantized]
    done, expected = (
        sum(product.multiply_adds for product in file.values() if product.is_quantized) for file in (found, reference)
    )
    assert done >= expected > 0
    inputs = sample(ours)
    (value,), (exact,) = (OnnxTarget().load(path).run(inputs).values() for path in (int8, ours))
    assert relative_l2(value, exact) < INT8_ERROR


def test_small_backbone_keeps_its_quantized_products(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lowered = onnx_cases.lower(onnx_cases.SmallBackbone(), torch.randn(1, 3, 16, 16))
    assert_as_quantized_as_plain(lowered, tmp_path)


def test_no_constant_ends_in_a_digit(backbone_file: Path) -> None:
    """The quantiser numbers the copies of a shared bias, and another value may have that name."""
    assert not [tensor.name for tensor in onnx.load(backbone_file).graph.initializer if tensor.name[-1].isdigit()]


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_every_family_keeps_its_quantized_products(name: str, tmp_path: Path) -> None:
    module = distinct(build(MODELS[name])).eval()
    image = torch.zeros(1, 3, MODELS[name].input_size, MODELS[name].input_size)
    program = lower(capture(module, (image,)), (*SHARED, *OnnxTarget.passes))
    described = {"name": name, "mean": None, "std": None, "labels": None, "metadata": {}}
    assert_as_quantized_as_plain(
        Lowered(program=program, input_names=("image",), output_names=("logits",), **described), tmp_path
    )
