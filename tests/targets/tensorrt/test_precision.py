import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_cases
import onnx_ir as ir
import pytest
import torch
from tensorrt_graphs import needs_rtx
from torch import nn

from mobilemix.inspection import inspect_artifact
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Lowered
from mobilemix.targets.onnx.half import WIDE_OPERATORS
from mobilemix.targets.tensorrt import checks, convert
from mobilemix.targets.tensorrt.builder import parse
from mobilemix.targets.tensorrt.precision import layers as layers_of

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
PRODUCTS = ("Conv", "Gemm")
"""Of the small backbone; some of its MatMuls are products of two activations."""


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    torch.manual_seed(0)
    made = onnx_cases.lower(onnx_cases.SmallBackbone(), torch.randn(1, 3, 16, 16))
    return dataclasses.replace(made, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


@pytest.fixture(scope="module")
def written(lowered: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def write(precision: str) -> Path:
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp(precision) / "small.tensorrt.onnx"
            convert.write(lowered, recipe(precision), made[precision])
        return made[precision]

    return write


def recipe(precision: str) -> Recipe:
    return Recipe(target="tensorrt", precision=precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_have_the_precision_and_sums_are_wide(written: Callable[[str], Path], precision: str) -> None:
    layers = layers_of(ir.load(written(precision)).graph)
    assert {layer.precision for layer in layers if layer.operator in PRODUCTS} == {precision}
    assert {layer.precision for layer in layers if layer.operator in WIDE_OPERATORS} == {"fp32"}
    around = {"int8": "fp16", "fp8": "fp16"}.get(precision, precision)
    assert {layer.precision for layer in layers} == {precision, around, "fp32"}
    assert not {"Cast", "QuantizeLinear", "DequantizeLinear"} & {layer.operator for layer in layers}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_layers_have_modules(written: Callable[[str], Path], precision: str) -> None:
    modules = {layer.module for layer in layers_of(ir.load(written(precision)).graph) if layer.operator in PRODUCTS}
    assert {"head", "squeeze.1"} <= modules


def test_an_inspection_has_the_same(written: Callable[[str], Path]) -> None:
    found = inspect_artifact(written("int8"))
    assert found.layers == layers_of(ir.load(written("int8")).graph)
    counts = Counter(layer.precision for layer in found.layers)
    assert {name: part.layers for name, part in found.precisions.items()} == counts
    assert sum(part.multiply_adds for part in found.precisions.values()) == found.cost.multiply_adds
    assert min(found.precisions[name].multiply_adds for name in ("int8", "fp16")) > 0
    assert found.precisions["fp32"].multiply_adds == 0


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_files_are_their_twins_rounded(lowered: Lowered, written: Callable[[str], Path], precision: str) -> None:
    sample = {"image": np.random.default_rng(0).standard_normal((1, 3, 16, 16), np.float32)}
    found = {
        check.name: check for check in checks.run(lowered, recipe(precision), written(precision), [sample], "tensorrt")
    }
    assert found[f"{precision} file is the twin, rounded"].passed, found
    assert all(check.passed is not False for check in found.values()), found


def test_what_takes_no_photograph_cannot_be_calibrated(tmp_path: Path) -> None:
    lowered = onnx_cases.lower(nn.Linear(4, 4), torch.randn(1, 4))
    with pytest.raises(Exception, match="calibrated on photographs"):
        convert.write(lowered, recipe("int8"), tmp_path / "linear.onnx")


@needs_rtx
@pytest.mark.parametrize("precision", PRECISIONS)
def test_nvidias_parser_takes_every_precision(written: Callable[[str], Path], precision: str) -> None:
    assert parse(written(precision), "tensorrt-rtx") == ()
