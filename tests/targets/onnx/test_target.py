from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import pytest
import torch
from torch import nn

from mobilemix.recipe import Recipe
from mobilemix.targets import find_target
from mobilemix.targets.onnx import OnnxTarget, checks

RECIPE = Recipe(target="onnx")


def samples() -> list[dict[str, np.ndarray]]:
    return [{"image": np.random.default_rng(0).standard_normal((1, 3, 16, 16), np.float32)}]


def verdicts(backbone: Path, inputs: list[dict[str, np.ndarray]]) -> dict[str, bool | None]:
    lowered = onnx_cases.lower(nn.ReLU(), torch.randn(1))
    return {check.name: check.passed for check in OnnxTarget().checks(lowered, RECIPE, backbone, inputs)}


def test_the_table_finds_it() -> None:
    target = find_target("onnx")
    assert (target.name, target.suffix, target.precisions[0], target.takes_images) == ("onnx", ".onnx", "fp32", False)


def test_histogram_counts_every_node(backbone: Path) -> None:
    histogram = OnnxTarget().op_histogram(backbone)
    assert sum(histogram.values()) == len(onnx.load(backbone).graph.node)
    assert list(histogram) == sorted(histogram)
    assert histogram["LayerNormalization"] == 2


def test_checks_pass_on_a_compiled_file(backbone: Path) -> None:
    found = verdicts(backbone, samples())
    assert len(found) == 3
    assert all(found.values())


def test_foreign_operators_fail_a_check(backbone: Path) -> None:
    model = onnx.load(backbone)
    node = next(node for node in model.graph.node if node.op_type == "Sigmoid")
    node.op_type, node.domain = "Gelu", "com.microsoft"
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, backbone)
    assert [name for name, passed in verdicts(backbone, samples()).items() if not passed] == ["standard operators"]


def test_file_that_optimisation_changes_fails_a_check(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.OPTIMISATION_TOLERANCE, "fp32", 0.0)
    assert [name for name, passed in verdicts(backbone, samples()).items() if not passed] == [
        "ONNX Runtime with and without optimisation"
    ]


def test_invalid_file_fails_a_check(backbone: Path) -> None:
    model = onnx.load(backbone)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 7
    onnx.save(model, backbone)
    assert verdicts(backbone, [])["onnx.checker"] is False
