"""The check of quantised files passes on what ONNX Runtime computes, and finds what a file or a kernel has wrong."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from torch import nn

from mobilemix.parity import Tolerance
from mobilemix.quantization.options import Quantization
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Inputs
from mobilemix.targets.onnx import OnnxTarget, simulation
from mobilemix.targets.onnx.quantize import quantize
from mobilemix.targets.onnx.simulation import simulated

SAMPLES = [{"image": np.random.default_rng(seed).standard_normal((1, 3, 16, 16), np.float32)} for seed in range(4)]


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self._samples = iter(SAMPLES)

    def get_next(self) -> Inputs | None:
        return next(self._samples, None)


@pytest.fixture
def static(backbone: Path, tmp_path: Path) -> Path:
    """`SmallBackbone` as ONNX Runtime's own quantiser writes it."""
    path = tmp_path / "static.onnx"
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantize_static(backbone, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
    return path


def edit(path: Path, change: Callable[[onnx.GraphProto], None]) -> None:
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)


def middle(graph: onnx.GraphProto) -> onnx.NodeProto:
    """A dequantisation of an activation in the middle of a graph."""
    weights = {tensor.name for tensor in graph.initializer}
    found = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] not in weights]
    return found[len(found) // 2]


def test_static_integers_pass(static: Path) -> None:
    check = simulated(static, "int8", SAMPLES)
    assert check.passed, check.detail
    count, what, *_ = check.detail.split()
    assert (what, int(count) > 1000) == ("integers,", True)


@pytest.mark.parametrize("kind", ["MatMul", "Conv"])
def test_integers_of_ranges_found_at_run_time_pass(backbone: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "dynamic.onnx"
    quantize_dynamic(backbone, path, weight_type=QuantType.QUInt8, op_types_to_quantize=[kind])
    assert "DynamicQuantizeLinear" in {node.op_type for node in onnx.load(path).graph.node}
    check = simulated(path, "int8-dynamic", SAMPLES)
    assert check.passed, check.detail


@pytest.mark.parametrize(("index", "kind"), [(2, "zero point"), (1, "scale")])
def test_another_zero_point_or_scale_on_the_way_back_is_found(static: Path, index: int, kind: str) -> None:
    def change(graph: onnx.GraphProto) -> None:
        node = middle(graph)
        content = next(tensor for tensor in graph.initializer if tensor.name == node.input[index])
        array = numpy_helper.to_array(content)
        other = array + 1 if kind == "zero point" else array * np.float32(1.001)
        graph.initializer.append(numpy_helper.from_array(other.astype(array.dtype), "other"))
        node.input[index] = "other"

    edit(static, change)
    check = simulated(static, "int8", SAMPLES)
    assert not check.passed
    assert "another scale or zero point" in check.detail


def planted(path: Path, largest: int) -> Inputs:
    """A product whose neighbouring terms add up to more than 16 bits where weights are up to `largest`."""
    weight = np.full((8, 2), largest, np.int8)
    weight[:, 1] = -largest
    constants = {
        "weight": weight,
        "weight_scale": np.float32(0.01),
        "scale": np.float32(1 / 255),
        "zero": np.uint8(0),
        "result_scale": np.float32(0.2),
        "result_zero": np.uint8(128),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x.quantised"]),
        helper.make_node("DequantizeLinear", ["x.quantised", "scale", "zero"], ["x.dequantised"]),
        helper.make_node("DequantizeLinear", ["weight", "weight_scale"], ["weight.dequantised"]),
        helper.make_node("MatMul", ["x.dequantised", "weight.dequantised"], ["product"]),
        helper.make_node("QuantizeLinear", ["product", "result_scale", "result_zero"], ["product.quantised"]),
        helper.make_node("DequantizeLinear", ["product.quantised", "result_scale", "result_zero"], ["y"]),
    ]
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    inputs, outputs = (helper.make_tensor_value_info(*each) for each in (("x", 1, [3, 8]), ("y", 1, [3, 2])))
    graph = helper.make_graph(nodes, "planted", [inputs], [outputs], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return {"x": np.linspace(0.7, 1, 24, dtype=np.float32).reshape(3, 8)}


def emulate(monkeypatch: pytest.MonkeyPatch, product: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Let a runtime compute `planted`'s product of integers as `product` does, and all else as it is written."""

    def observe(path: Path, names: Iterable[str], samples: Iterable[Inputs], optimised: bool) -> Iterator[Inputs]:
        constants = {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
        for sample in samples:
            integers = np.rint(sample["x"] / constants["scale"]).astype(np.int32)
            sums = product(integers, constants["weight"].astype(np.int32))
            steps = sums * (constants["scale"] * constants["weight_scale"] / constants["result_scale"])
            found = np.clip(np.rint(steps) + 128, 0, 255)
            yield {
                "x.quantised": integers.astype(np.float32),
                "product.quantised": found.astype(np.float32),
                "y": ((found - 128) * constants["result_scale"]).astype(np.float32),
            }

    monkeypatch.setattr(simulation, "observe", observe)


def saturating(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """VPMADDUBSW: sums of two neighbouring products of u8 and s8 are clipped to 16 bits, then added up."""
    pairs = (a[:, :, None] * b[None]).reshape(len(a), -1, 2, b.shape[1]).sum(2)
    return np.clip(pairs, -(1 << 15), (1 << 15) - 1).sum(1)


def test_planted_integers_pass(tmp_path: Path) -> None:
    path = tmp_path / "planted.onnx"
    assert simulated(path, "int8", [planted(path, 63)]).passed


def test_a_right_kernel_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "planted.onnx"
    sample = planted(path, 127)
    emulate(monkeypatch, np.matmul)
    assert simulated(path, "int8", [sample]).passed


def test_a_kernel_that_saturates_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "planted.onnx"
    sample = planted(path, 127)
    emulate(monkeypatch, saturating)
    check = simulated(path, "int8", [sample])
    assert not check.passed
    assert "product.quantised is" in check.detail


def test_weights_of_seven_bits_keep_it_from_saturating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "planted.onnx"
    sample = planted(path, 63)
    emulate(monkeypatch, saturating)
    assert simulated(path, "int8", [sample]).passed


def test_a_kernel_that_truncates_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "planted.onnx"
    sample = planted(path, 127)
    step = 0.2 / (0.01 / 255)
    emulate(monkeypatch, lambda a, b: np.floor(a @ b / step) * step)
    check = simulated(path, "int8", [sample])
    assert not check.passed
    assert "steps from what it is rounded from" in check.detail


def weights_only(path: Path) -> Inputs:
    generator = np.random.default_rng(0)
    numbers = helper.make_tensor("weight", TensorProto.INT4, [64, 32], generator.integers(-8, 8, 2048).tolist())
    scales = numpy_helper.from_array(generator.uniform(0.01, 0.02, (2, 32)).astype(np.float32), "scale")
    nodes = [
        helper.make_node("DequantizeLinear", ["weight", "scale"], ["weight.dequantised"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "weight.dequantised"], ["y"]),
    ]
    inputs, outputs = (helper.make_tensor_value_info(*each) for each in (("x", 1, [9, 64]), ("y", 1, [9, 32])))
    graph = helper.make_graph(nodes, "weights", [inputs], [outputs], [numbers, scales])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return {"x": generator.standard_normal((9, 64)).astype(np.float32)}


def test_weights_of_four_bits_pass(tmp_path: Path) -> None:
    path = tmp_path / "weights.onnx"
    sample = weights_only(path)
    check = simulated(path, "w4", [sample])
    assert check.passed, check.detail
    assert check.detail.startswith("outputs")


def test_what_the_runtime_rounds_by_itself_is_held_to_the_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.onnx"
    sample = weights_only(path)
    monkeypatch.setattr(simulation, "TIERS", {"w4": Tolerance(relative_l2=0.0, cosine=1.0)})
    assert not simulated(path, "w4", [sample]).passed


def test_an_output_that_departs_is_found(static: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = simulation.observe

    def observe(*arguments: object, **options: object) -> Iterator[Inputs]:
        for found in real(*arguments, **options):
            yield {**found, "logits": found["logits"] * np.float32(1.001)}

    monkeypatch.setattr(simulation, "observe", observe)
    assert not simulated(static, "int8", SAMPLES).passed


def test_a_bias_leaves_room_for_what_it_is_added_to(tmp_path: Path) -> None:
    """Sums that wrap around are of the other sign: a bias that is all of the layer's result fills 32 bits by itself."""
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(32, 32, 1) for _ in range(3)]
    layers = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2]).eval()
    convolutions[0].bias.data.zero_()
    convolutions[1].weight.data.abs_()
    convolutions[1].bias.data.abs_().add_(1)
    full, path = tmp_path / "full.onnx", tmp_path / "narrow.onnx"
    lowered = onnx_cases.lower(layers, torch.randn(1, 32, 8, 8), outputs=("y",))
    OnnxTarget().compile(lowered, Recipe(target="onnx", opset=21), full)
    (name,) = lowered.input_names
    samples = [{name: np.random.default_rng(0).standard_normal((1, 32, 8, 8), np.float32) * np.float32(1e-5)}]
    quantize(full, path, samples, Quantization())
    check = simulated(path, "int8", samples)
    assert check.passed, check.detail
