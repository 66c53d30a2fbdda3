import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from mobilemix.errors import UnknownNameError
from mobilemix.parity import relative_l2
from mobilemix.quantization.options import Quantization
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Inputs
from mobilemix.targets.onnx import OnnxTarget, checks
from mobilemix.targets.onnx.pairs import QUANTISED, SCALE
from mobilemix.targets.onnx.runtime import OnnxRunner
from mobilemix.targets.onnx.weights import BLOCK, layers, quantize

IMAGE = (1, 3, 12, 12)
DEFAULT = Quantization()
ERRORS = {"w8": (1e-4, 2e-2), "w4": (1e-2, 3e-1)}
"""Least and largest relative L2 error of a few layers; less, and nothing was rounded."""
FOLDED_TOLERANCE = 1e-5
"""Relative L2, between ONNX Runtime with and without its optimisations."""


class Small(nn.Module):
    """Convolutions of several kinds, and matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3, groups=64)
        self.point, self.odd = nn.Conv2d(64, 96, 1), nn.Conv2d(96, 35, 1)
        self.map, self.head = nn.Linear(35, 64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.odd(self.point(self.depthwise(self.stem(x).relu()).relu()).relu())
        x = self.map(x.flatten(2).transpose(1, 2)).relu()
        return self.head(x.mean(1))


def samples(count: int = 3) -> list[Inputs]:
    generator = np.random.default_rng(0)
    return [{"x": generator.standard_normal(IMAGE, np.float32)} for _ in range(count)]


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("full") / "model.onnx"
    lowered = onnx_cases.lower(Small().eval(), torch.randn(IMAGE))
    lowered = dataclasses.replace(lowered, input_names=("x",), output_names=("y",))
    OnnxTarget().compile(lowered, Recipe(target="onnx", opset=21), path)
    return path


Make = Callable[[str, Quantization], Path]


@pytest.fixture(scope="module")
def narrow(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    made: dict[tuple[str, Quantization], Path] = {}

    def make(precision: str, options: Quantization = DEFAULT) -> Path:
        if (precision, options) not in made:
            path = made[precision, options] = tmp_path_factory.mktemp(precision) / "model.onnx"
            quantize(full, path, samples(), options, precision)
            onnx.checker.check_model(path, full_check=True)
        return made[precision, options]

    return make


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_results_are_those_of_rounded_weights(full: Path, narrow: Make, precision: str) -> None:
    runners = OnnxRunner(narrow(precision, DEFAULT)), OnnxRunner(full)
    found, expected = (np.stack([runner.run(each)["y"] for each in samples()]) for runner in runners)
    least, largest = ERRORS[precision]
    assert least < relative_l2(found, expected) < largest


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_the_runtime_folds_the_weights_and_computes_in_float(
    full: Path, narrow: Make, precision: str, tmp_path: Path
) -> None:
    def operators(path: Path) -> Counter[str]:
        options = ort.SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "folded.onnx"), 4
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node)

    path = narrow(precision, DEFAULT)
    assert operators(path) == operators(full)
    for each in samples():
        optimised, plain = (OnnxRunner(path, optimised=which).run(each)["y"] for which in (True, False))
        assert relative_l2(optimised, plain) < FOLDED_TOLERANCE


@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_the_file_is_the_float_one_rounded(full: Path, narrow: Make, precision: str) -> None:
    twin, model = onnx.load(full), onnx.load(narrow(precision, DEFAULT))
    found = [each for each, _ in layers(ir.load(full).graph, DEFAULT, precision)]
    assert len(found) == 6
    assert checks.first_difference(twin, model) is None
    assert checks.first_float(found, ir.from_proto(model), weights_only=True) is None


@pytest.mark.parametrize("ending", [QUANTISED, SCALE])
@pytest.mark.parametrize("precision", ["w8", "w4"])
def test_planted_faults_are_found(full: Path, narrow: Make, precision: str, ending: str) -> None:
    twin, model = onnx.load(full), onnx.load(narrow(precision, DEFAULT))
    tensor = next(each for each in model.graph.initializer if each.name.startswith("point") and ending in each.name)
    content = numpy_helper.to_array(tensor)
    changed = np.roll(content, 1) if ending == QUANTISED else content * np.float32(1.2)
    tensor.CopyFrom(numpy_helper.from_array(changed.astype(content.dtype), tensor.name))
    assert "is not the rounded one" in str(checks.first_difference(twin, model))


def test_four_bits_are_in_blocks_where_there_are_rows(narrow: Make) -> None:
    found = {tensor.name: tensor for tensor in onnx.load(narrow("w4", DEFAULT)).graph.initializer}
    four = {name.partition(".")[0]: each for name, each in found.items() if each.data_type == onnx.TensorProto.INT4}
    assert not {"stem", "depthwise"} & four.keys()
    assert list(four["point"].dims) == [96, 64 // BLOCK, BLOCK, 1, 1]
    assert len(four) == 4


def test_files_are_as_small_as_their_numbers(full: Path, narrow: Make) -> None:
    def weights(path: Path) -> int:
        return sum(len(each.raw_data) for each in onnx.load(path).graph.initializer if len(each.dims) > 1)

    sizes = [weights(path) for path in (full, narrow("w8", DEFAULT), narrow("w4", DEFAULT))]
    assert sizes[1] < 0.3 * sizes[0]
    assert sizes[2] < 0.75 * sizes[1]


def test_patterns_choose_among_precisions(full: Path) -> None:
    options = Quantization(layers=(("point*", "float"), ("head*", "w8")))
    found = {each.module: bits for each, bits in layers(ir.load(full).graph, options, "w4")}
    assert "point" not in found
    assert found["head"] == 8
    assert 4 in found.values()
    with pytest.raises(UnknownNameError, match=r"layer 'pointt'; did you mean 'point'"):
        list(layers(ir.load(full).graph, Quantization(layers=(("pointt", "float"),)), "w4"))


def test_rounding_by_moments_leaves_less_error(full: Path, narrow: Make) -> None:
    options = Quantization(rounding="adaround", bias_correction=True)
    reference = OnnxRunner(full)

    def error(options: Quantization) -> float:
        runner = OnnxRunner(narrow("w4", options))
        return max(relative_l2(runner.run(each)["y"], reference.run(each)["y"]) for each in samples())

    assert error(options) < error(DEFAULT)
    assert checks.first_difference(onnx.load(full), onnx.load(narrow("w4", options)), options) is None
