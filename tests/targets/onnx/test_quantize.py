import dataclasses
import json
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

from mobilemix.errors import InputError
from mobilemix.parity import relative_l2
from mobilemix.quantization.options import FORMATS, Quantization
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Inputs
from mobilemix.targets.onnx import OnnxTarget, checks
from mobilemix.targets.onnx.pairs import DEQUANTISED, QUANTISED, SCALE
from mobilemix.targets.onnx.products import kept
from mobilemix.targets.onnx.quantize import UNHELD, place, quantize
from mobilemix.targets.onnx.runtime import OnnxRunner

DEFAULT = Quantization()
ERRORS = (1e-3, 1e-1)
"""Least and largest relative L2 error of a few layers; less, and nothing was rounded."""
IMAGE = (1, 24, 16, 16)


class Block(nn.Module):
    """What a mobile network is made of: products, a depthwise convolution, gates, a pool, a residual sum, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(24, 32, 1)
        self.wide, self.depthwise, self.narrow = (
            nn.Conv2d(32, 64, 1),
            nn.Conv2d(64, 64, 3, 1, 1, groups=64),
            nn.Conv2d(64, 32, 1),
        )
        self.far = nn.Conv2d(32, 32, 7, 1, 3, groups=32)
        self.few = nn.Conv2d(32, 32, 1, groups=4)
        self.gate = nn.Conv2d(32, 32, 1)
        self.head = nn.Linear(32, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.narrow(nn.functional.silu(self.depthwise(nn.functional.silu(self.wide(x)))))
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        x = self.narrow(self.wide(x))
        x = self.few(self.far(nn.functional.layer_norm(x, x.shape[1:])))
        return self.head(x.mean((2, 3)))


def samples(count: int = 4) -> list[Inputs]:
    """Of channels that depend on each other, as those of images do."""
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((24, 6), np.float32) / np.float32(6) ** 0.5
    latent = generator.standard_normal((count, 1, 6, 16, 16), np.float32)
    return [{"x": np.einsum("oc,bchw->bohw", mixing, each)} for each in latent]


def compiled(folder: Path, module: nn.Module, *inputs: Tensor) -> Path:
    path = folder / "model.onnx"
    lowered = dataclasses.replace(onnx_cases.lower(module.eval(), *inputs), input_names=("x",), output_names=("y",))
    OnnxTarget().compile(lowered, Recipe(target="onnx", opset=21), path)
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return compiled(tmp_path_factory.mktemp("full"), Block(), torch.randn(IMAGE))


@pytest.fixture(scope="module")
def narrow(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Quantization], Path]:
    made: dict[Quantization, Path] = {}

    def make(options: Quantization) -> Path:
        if options not in made:
            made[options] = tmp_path_factory.mktemp("int8") / "model.onnx"
            quantize(full, made[options], samples(), options)
            onnx.checker.check_model(made[options], full_check=True)
        return made[options]

    return make


def fused(path: Path, folder: Path) -> Counter[str]:
    """Operators that ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "fused.onnx"), 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "fused.onnx").graph.node)


def modules(path: Path, options: Quantization = DEFAULT) -> list[str]:
    graph = ir.load(path).graph
    return sorted(each.module for each in place(graph, kept(graph, options)).layers)


def test_layers_that_gain_compute_in_integers(full: Path) -> None:
    found = modules(full)
    assert found == sorted(["stem", "wide", "depthwise", "narrow", "gate", "wide", "narrow", "head"])


def test_every_node_that_was_placed_becomes_an_integer_kernel(
    full: Path, narrow: Callable[[Quantization], Path], tmp_path: Path
) -> None:
    operators = fused(narrow(DEFAULT), tmp_path)
    placement = place(ir.load(full).graph)
    wanted = Counter(node.op_type for node in placement.nodes)
    for name in ("Conv", "Mul", "Sigmoid"):
        assert operators[f"QLinear{name}"] == wanted[name] > 0
    assert operators["QGemm"] == wanted["Gemm"] == 1
    assert not operators["Relu"]
    assert operators["Add"]  # residual sums are in float


@pytest.mark.parametrize("form", FORMATS)
def test_results_are_those_of_eight_bits(full: Path, narrow: Callable[[Quantization], Path], form: str) -> None:
    runners = OnnxRunner(narrow(Quantization(format=form)), optimised=False), OnnxRunner(full, optimised=False)
    found, expected = ([runner.run(each)["y"] for each in samples()] for runner in runners)
    least, largest = ERRORS
    assert least < relative_l2(np.stack(found), np.stack(expected)) < largest


@pytest.mark.parametrize("form", FORMATS)
def test_types_are_those_of_the_format(narrow: Callable[[Quantization], Path], form: str) -> None:
    model = ir.load(narrow(Quantization(format=form)))
    values = {node.inputs[2].dtype for node in model.graph if node.op_type == "QuantizeLinear"}
    assert values == {ir.DataType.INT8 if form == "s8s8" else ir.DataType.UINT8}
    held = [
        value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if ".weight@" in name and name.endswith(QUANTISED)
    ]
    assert {each.dtype for each in held} == {np.dtype(np.uint8 if form == "u8u8" else np.int8)}
    middle, largest = 128 if form == "u8u8" else 0, 63 if form == "u8s7" else 127
    assert {int(np.abs(each.astype(int) - middle).max()) for each in held} == {largest}


def test_the_same_file_every_time(full: Path, narrow: Callable[[Quantization], Path], tmp_path: Path) -> None:
    quantize(full, tmp_path / "again.onnx", samples(), DEFAULT)
    assert (tmp_path / "again.onnx").read_bytes() == narrow(DEFAULT).read_bytes()


def test_patterns_leave_layers_in_float(full: Path, narrow: Callable[[Quantization], Path]) -> None:
    options = Quantization(layers=(("*", "float"), ("head", "int8")))
    assert modules(full, options) == ["head"]
    model = ir.load(narrow(options))
    assert [node.op_type for node in model.graph].count("QuantizeLinear") == 1
    assert not [
        node for node in model.graph if node.op_type == "Conv" and str(node.inputs[1].name).endswith(DEQUANTISED)
    ]


def test_a_depthwise_convolution_between_floats_stays_one(tmp_path: Path) -> None:
    module = nn.Sequential(nn.GELU(), nn.Conv2d(24, 24, 3, groups=24), nn.GELU(), nn.Conv2d(24, 24, 1), nn.GELU())
    assert modules(compiled(tmp_path, module, torch.randn(IMAGE))) == ["3"]


def spiked() -> list[Inputs]:
    """Samples of which one has a number, of channel 0, that leaves no step of 8 bits to the others."""
    first, *others = samples()
    first["x"][0, 0, 3, 3] = 600
    return [first, *others]


def test_values_that_8_bits_do_not_hold_stay_in_float_with_what_computes_and_reads_them(tmp_path: Path) -> None:
    layers = nn.Conv2d(24, 24, 1), nn.Conv2d(24, 24, 1), nn.ReLU(), nn.Conv2d(24, 32, 1), nn.GELU()
    module = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))
    with torch.no_grad():
        nn.init.dirac_(module[0].weight)
        module[1].weight[:, 0] = 0  # the spike ends here
    source, path = compiled(tmp_path, module, torch.randn(IMAGE)), tmp_path / "int8.onnx"
    quantize(source, path, spiked(), Quantization(observer="min-max"))
    lost = json.loads({entry.key: entry.value for entry in onnx.load(path).metadata_props}[UNHELD])
    assert len(lost) == 2
    assert "x" in lost
    graph = ir.load(source).graph
    assert [each.module for each in place(graph).layers] == ["0", "1", "3"]
    assert [each.module for each in place(graph, (), lost).layers] == ["3"]
    outputs = [OnnxRunner(each).run(spiked()[1])["y"] for each in (path, source)]
    assert ERRORS[0] < relative_l2(*outputs) < ERRORS[1]


def test_nothing_that_8_bits_hold_is_said(tmp_path: Path) -> None:
    source = compiled(tmp_path, nn.Sequential(nn.Conv2d(24, 32, 1), nn.Conv2d(32, 24, 1)), torch.randn(IMAGE))
    with pytest.raises(InputError, match="8 bits hold no value"):
        quantize(source, tmp_path / "int8.onnx", spiked(), Quantization(observer="min-max"))


def test_what_cannot_be_quantised_is_said(full: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="to quantise; use fp16"):
        quantize(full, tmp_path / "int8.onnx", samples(), Quantization(layers=(("*", "float"),)))


def test_a_bias_that_needs_more_than_32_bits_takes_a_larger_step(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(24, 24, 1), nn.Conv2d(24, 24, 1))
    with torch.no_grad():
        module[0].weight[0], module[0].bias[0] = 1e-12, 3.0
    source, made = compiled(tmp_path, module, torch.randn(IMAGE)), tmp_path / "int8.onnx"
    options = Quantization(layers=(("1", "float"),))
    source_model = onnx.load(source)
    quantize(source, made, samples(), options)
    assert checks.first_difference(source_model, onnx.load(made)) is None


def test_rounding_and_corrected_biases_leave_less_error(full: Path, narrow: Callable[[Quantization], Path]) -> None:
    graph = ir.load(full).graph
    first = next(str(each.node.outputs[0].name) for each in place(graph).layers)

    def error(options: Quantization) -> float:
        """Of the first layer, before its Relu, on samples that were not shown."""
        model, twin = onnx.load(narrow(options)), onnx.load(full)
        for each in (model, twin):
            each.graph.output.append(onnx.helper.make_empty_tensor_value_info(first))
        plain = ort.SessionOptions()
        plain.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        sessions = [ort.InferenceSession(each.SerializeToString(), plain) for each in (model, twin)]
        found, expected = (np.stack([each.run([first], dict(x))[0] for x in samples(12)[4:]]) for each in sessions)
        return relative_l2(found, expected)

    adaround, corrected = Quantization(rounding="adaround"), Quantization(bias_correction=True)
    assert error(adaround) < error(DEFAULT)
    for options in (adaround, corrected):
        assert checks.first_difference(onnx.load(full), onnx.load(narrow(options)), options) is None
    biases = [
        {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(narrow(each)).graph.initializer}
        for each in (DEFAULT, corrected)
    ]
    assert any(not np.array_equal(biases[0][name], biases[1][name]) for name in biases[0] if "bias" in name)


def change(model: onnx.ModelProto, ending: str, by: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(each for each in model.graph.initializer if each.name.endswith(ending) and "wide" in each.name)
    tensor.CopyFrom(numpy_helper.from_array(by(numpy_helper.to_array(tensor).copy()), tensor.name))


FAULTS: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = [
    (QUANTISED, lambda x: np.roll(x, 1)),
    (SCALE, lambda x: x * np.float32(1.02)),
]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(
    full: Path, narrow: Callable[[Quantization], Path], fault: tuple[str, Callable[[np.ndarray], np.ndarray]]
) -> None:
    twin, model = onnx.load(full), onnx.load(narrow(DEFAULT))
    assert checks.first_difference(twin, model) is None
    change(model, *fault)
    assert "is not the rounded one" in str(checks.first_difference(twin, model))


def test_a_product_that_was_left_out_is_found(full: Path, narrow: Callable[[Quantization], Path]) -> None:
    layers, model = place(ir.load(full).graph).layers, onnx.load(narrow(DEFAULT))
    assert checks.first_float(layers, ir.from_proto(model)) is None
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    pairs = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type.endswith("tizeLinear")}
    conv.input[0] = pairs[pairs[conv.input[0]]]
    assert checks.first_float(layers, ir.from_proto(model)) == f"Conv {conv.name} is not quantised"


def test_values_beyond_float16_are_all_named() -> None:
    peaks = [(1e5, "a"), (3.0, "b"), (2e5, "c"), (7e4, "a")]
    found = checks.in_range(peaks)
    assert found.passed is False
    assert found.detail == "2 values beyond 65504: c 2e+05, a 1e+05"
    near = checks.in_range([(9e3, "near"), (3.0, "b")])
    assert near.passed
    assert near.detail == "nothing beyond 65504; near: near 9e+03"
