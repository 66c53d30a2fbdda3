import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from mobilemix import ops
from mobilemix.capture import capture
from mobilemix.errors import InputError
from mobilemix.parity import relative_l2
from mobilemix.passes import lower
from mobilemix.quantization.options import Quantization
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Inputs
from mobilemix.targets.onnx import OnnxTarget, checks
from mobilemix.targets.onnx.observation import ranges
from mobilemix.targets.onnx.pairs import DEQUANTISED, QUANTISED, SCALE
from mobilemix.targets.onnx.quantize import stated_lost
from mobilemix.targets.onnx.runtime import OnnxRunner
from mobilemix.targets.tensorrt.quantize import Kind, by_channel, layers, quantised, quantize, step

DEFAULT = Quantization()
KINDS: tuple[Kind, ...] = ("int8", "fp8")
LARGEST = {"int8": 127.0, "fp8": 448.0}
ERRORS = {"int8": (1e-3, 5e-2), "fp8": (1e-2, 2e-1)}
"""Least and largest relative L2 error of a dozen layers; less, and nothing was rounded."""
SIGNIFICAND = 2.0**-4
"""Half of the distance between two 8-bit floats, relative to them."""
FLOAT16_STEP = 2.0**-10
"""Between two float16 numbers, relative to them."""


def samples(shape: tuple[int, ...], count: int = 4) -> list[Inputs]:
    generator = np.random.default_rng(0)
    return [{"x": generator.standard_normal(shape, np.float32)} for _ in range(count)]


class Renamed(nn.Module):
    """The small backbone, of an input that is called as all others here."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = onnx_cases.SmallBackbone()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


IMAGE = (1, 3, 16, 16)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("full") / "small.onnx"
    OnnxTarget().compile(onnx_cases.lower(Renamed(), torch.randn(IMAGE)), Recipe(target="onnx", opset=20), path)
    return path


@pytest.fixture(scope="module")
def narrow(full: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Kind], Path]:
    made: dict[Kind, Path] = {}

    def make(kind: Kind) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "small.onnx"
            quantize(full, made[kind], samples(IMAGE), kind, DEFAULT)
            onnx.checker.check_model(made[kind], full_check=True)
        return made[kind]

    return make


def compiled(folder: Path, module: nn.Module, *inputs: Tensor) -> Path:
    """A float32 file after the passes that make a model deployable."""
    torch.manual_seed(0)
    lowered = onnx_cases.lower(module, *inputs)
    program = lower(capture(module.eval(), inputs))
    path = folder / "model.onnx"
    OnnxTarget().compile(
        dataclasses.replace(lowered, program=program, input_names=("x",)),
        Recipe(target="onnx", opset=20),
        path,
    )
    return path


def quantised_modules(path: Path) -> list[str]:
    """Modules of the products that are to be quantised."""
    return [each.module for each in layers(ir.load(path).graph)]


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_weights_and_nothing_else_read_quantised_values(
    narrow: Callable[[Kind], Path], kind: Kind
) -> None:
    model = ir.load(narrow(kind))
    readers = {
        (user.op_type, index)
        for node in model.graph
        if node.op_type == "DequantizeLinear"
        for user, index in node.outputs[0].uses()
    }
    assert readers == {(op, index) for op in ("Conv", "Gemm", "MatMul") for index in (0, 1)}
    for node in model.graph:
        if node.op_type in ("Conv", "Gemm"):
            assert all(str(value.name).endswith(DEQUANTISED) for value in node.inputs[:2])
            assert all(not value.producer() for value in node.inputs[2:])  # the bias is a float constant


@pytest.mark.parametrize("kind", KINDS)
def test_scales_are_symmetric_and_of_the_type_around_them(narrow: Callable[[Kind], Path], kind: Kind) -> None:
    model = ir.load(narrow(kind))
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            value, scale, zero = node.inputs
            assert value.dtype == scale.dtype == ir.DataType.FLOAT16
            assert scale.shape.is_static()
            assert scale.shape.rank() == 0
            assert not zero.const_value.numpy().astype(float).any()
        if node.op_type == "DequantizeLinear" and node.inputs[0].is_initializer():
            weight, scale = node.inputs
            axis = node.attributes.get_int("axis")
            assert scale.dtype == node.outputs[0].dtype == ir.DataType.FLOAT16
            assert scale.shape == [weight.shape[axis]]
            assert weight.dtype == (ir.DataType.INT8 if kind == "int8" else ir.DataType.FLOAT8E4M3FN)


@pytest.mark.parametrize("kind", KINDS)
def test_results_are_those_of_eight_bits(full: Path, narrow: Callable[[Kind], Path], kind: Kind) -> None:
    reference, runner = OnnxRunner(full), OnnxRunner(narrow(kind), optimised=False)
    errors = [relative_l2(runner.run(each)["logits"], reference.run(each)["logits"]) for each in samples(IMAGE)]
    least, largest = ERRORS[kind]
    assert least < max(errors) < largest


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_file_every_time(full: Path, narrow: Callable[[Kind], Path], kind: Kind, tmp_path: Path) -> None:
    quantize(full, tmp_path / "again.onnx", samples(IMAGE), kind, DEFAULT)
    assert (tmp_path / "again.onnx").read_bytes() == narrow(kind).read_bytes()


def test_nodes_have_the_modules_of_what_they_were_made_for(narrow: Callable[[Kind], Path]) -> None:
    names = {str(node.name): node.op_type for node in ir.load(narrow("int8")).graph}
    assert names["inner.stem.2/x.quantised"] == "QuantizeLinear"
    assert names["inner.stem.2/x.dequantised"] == "DequantizeLinear"
    assert names["inner.stem.2/x.half"] == names["inner.head/logits"] == "Cast"


class Mixer(nn.Module):
    """Two products of activations: of a softmax, or not; and a map of the result."""

    def __init__(self, softmax: bool, residual: bool = False) -> None:
        super().__init__()
        self.maps, self.out, self.last = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 8)
        self.softmax, self.residual = softmax, residual

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.maps(x).chunk(3, -1)
        scores = q @ k.transpose(-1, -2)
        mixed = (scores.softmax(-1) if self.softmax else scores) @ v
        return self.last(F.gelu(self.out(x + mixed if self.residual else mixed)))


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (Mixer(softmax=True), 3),
        (Mixer(softmax=False), 1),  # what is made of the result stays too
        (Mixer(softmax=False, residual=True), 3),  # until it is added to what is not
    ],
)
def test_products_of_activations_stay(module: nn.Module, count: int, tmp_path: Path) -> None:
    path = compiled(tmp_path, module, torch.randn(1, 6, 8))
    assert len(quantised_modules(path)) == count
    assert [node.op_type for node in onnx.load(path).graph.node].count("MatMul") >= 2


@pytest.mark.parametrize(("groups", "count"), [(1, 2), (2, 2), (8, 1)])
def test_depthwise_convolutions_stay(groups: int, count: int, tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.SiLU(), nn.Conv2d(8, 8, 3, groups=groups))
    assert len(quantised_modules(compiled(tmp_path, module, torch.randn(1, 3, 8, 8)))) == count


class Filter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.mask = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        spectrum = torch.fft.rfft2(x, norm="ortho")
        parts = self.mask(torch.cat([spectrum.real, spectrum.imag], 1))
        spectrum = torch.complex(*parts.chunk(2, 1))
        return self.after(x + torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho"))


def test_transforms_and_what_reads_a_spectrum_stay(tmp_path: Path) -> None:
    path = compiled(tmp_path, Filter(), torch.randn(1, 3, 8, 8))
    assert quantised_modules(path) == ["before", "after"]
    matrices = [tensor.name for tensor in onnx.load(path).graph.initializer if tensor.name.startswith("dft_")]
    assert matrices  # else the rule went by another name than the passes do


def test_recurrences_stay(tmp_path: Path) -> None:
    class Scanned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.out = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            inputs = self.project(x)
            return self.out(ops.linear_scan(inputs.sigmoid(), inputs))

    path = compiled(tmp_path, Scanned(), torch.randn(40, 1, 4))
    quantize(path, tmp_path / "int8.onnx", samples((40, 1, 4)), "int8", DEFAULT)
    model = ir.load(tmp_path / "int8.onnx")
    scan = [node for node in model.graph if str(node.outputs[0].name).startswith("wide_") and node.op_type != "Cast"]
    assert scan
    makers = [value.producer() for node in scan for value in node.inputs if value is not None]
    assert "DequantizeLinear" not in {maker.op_type for maker in makers if maker is not None}
    assert {value.dtype for node in scan for value in node.outputs} <= {ir.DataType.FLOAT, ir.DataType.INT64}


@given(st.floats(2.0**-30, 6e4), st.sampled_from(KINDS))
def test_a_scale_is_the_next_float16_that_leaves_nothing_out(largest: float, kind: Kind) -> None:
    scale = float(step(np.array(largest), kind))
    assert scale == float(np.float16(scale)) > 0
    assert scale * LARGEST[kind] >= largest
    assert scale <= max(
        largest / LARGEST[kind] * (1 + FLOAT16_STEP), float(np.finfo(np.float16).smallest_subnormal)
    ) + (float(np.finfo(np.float16).smallest_subnormal))


def test_a_value_that_is_always_zero_has_a_scale() -> None:
    assert step(np.array(0.0), "int8") > 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_weights_are_within_half_a_step(axis: int) -> None:
    content = np.random.default_rng(0).standard_normal((6, 5, 4)).astype(np.float32)
    for kind in KINDS:
        numbers, scales = by_channel(content, axis, kind)
        assert len(scales) == content.shape[axis]
        shape = [-1 if other == axis else 1 for other in range(3)]
        error = np.abs(numbers.astype(np.float32) * scales.reshape(shape) - content)
        bound = scales.reshape(shape) / 2 if kind == "int8" else np.abs(content) * SIGNIFICAND + scales.max() * 2.0**-9
        assert np.all(error <= bound * (1 + 1e-5))
        others = tuple(other for other in range(3) if other != axis)
        assert np.all(np.abs(numbers.astype(np.float32)).max(others) >= LARGEST[kind] * (1 - SIGNIFICAND))


def test_what_is_beyond_the_range_is_clipped() -> None:
    assert quantised(np.array([1e3, -1e3, 0.2]), np.array(1.0), "int8").tolist() == [127, -127, 0]


class Outlier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4000, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


def test_values_that_8_bits_do_not_hold_stay_in_float(tmp_path: Path) -> None:
    """One number of one sample leaves no step of int8 to the others, and all to floats of 8 bits."""
    first, *others = samples((1, 24, 16, 16))
    first["x"][0, 0, 3, 3] = 600
    module = nn.Sequential(nn.Conv2d(24, 24, 1), nn.GELU(), nn.Conv2d(24, 32, 1), nn.AdaptiveAvgPool2d(1))
    with torch.no_grad():
        module[0].weight[:, 0] = 0
    source, path = compiled(tmp_path, module, torch.randn(1, 24, 16, 16)), tmp_path / "narrow.onnx"
    for kind, lost in (("int8", ["x"]), ("fp8", [])):
        quantize(source, path, [first, *others], kind, Quantization(observer="min-max") if kind == "int8" else DEFAULT)
        assert stated_lost(path) == lost
        read = layers(ir.load(source).graph, (), lost)
        assert [each.module for each in read] == (["2"] if lost else ["0", "2"])
        assert checks.first_float(layers(ir.load(source).graph, (), lost), ir.load(path)) is None
        assert checks.first_difference(onnx.load(source), onnx.load(path)) is None


def test_ranges_clip_outliers_of_int8_and_nothing_of_floats(tmp_path: Path) -> None:
    path = compiled(tmp_path, Outlier(), torch.randn(1, 4000))
    given = {"x": np.random.default_rng(0).standard_normal((1, 4000)).astype(np.float32)}
    given["x"][0, 17] = 10
    (name,) = (str(each.activation.name) for each in layers(ir.load(path).graph))
    assert ranges(path, [name], [given], "min-max", symmetric=True) == {name: (-10.0, 10.0)}
    assert 3 < ranges(path, [name], [given], "mse", symmetric=True)[name][1] < 10


def test_weights_on_the_left_have_channels_in_rows(tmp_path: Path) -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.weight @ x

    path = compiled(tmp_path, Left(), torch.randn(2, 6, 7))
    (found,) = layers(ir.load(path).graph)
    assert found.weight.shape[found.axis] == 5


@pytest.mark.parametrize(
    ("module", "opset", "message"),
    [(nn.Linear(4, 4), 18, "int8 with float16 scales needs opset 19"), (nn.ReLU(), 20, "to quantise; use fp16")],
)
def test_what_cannot_be_quantised_is_said(module: nn.Module, opset: int, message: str, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    OnnxTarget().compile(onnx_cases.lower(module, torch.randn(1, 4)), Recipe(target="onnx", opset=opset), source)
    with pytest.raises(InputError, match=message):
        quantize(source, tmp_path / "int8.onnx", [], "int8", DEFAULT)
    assert not (tmp_path / "int8.onnx").exists()


def tensor(model: onnx.ModelProto, ending: str) -> TensorProto:
    return next(each for each in model.graph.initializer if each.name.endswith(ending) and "head" in each.name)


def change(found: TensorProto, content: np.ndarray) -> None:
    found.CopyFrom(numpy_helper.from_array(content, found.name))


def change_weight(model: onnx.ModelProto) -> None:
    found = tensor(model, QUANTISED)
    content = numpy_helper.to_array(found).copy()
    content.flat[0] += 1
    change(found, content)


def change_scale(model: onnx.ModelProto) -> None:
    found = tensor(model, f"weight{SCALE}.half")
    change(found, numpy_helper.to_array(found) * np.float16(1.01))


def change_zero_point(model: onnx.ModelProto) -> None:
    found = next(each for each in model.graph.initializer if each.name.startswith("zero."))
    change(found, np.array(1, np.int8))


def change_activation_scale(model: onnx.ModelProto) -> None:
    found = next(each for each in model.graph.initializer if each.name.endswith(f"{SCALE}.half") and not each.dims)
    change(found, np.array(0, np.float16))


@pytest.mark.parametrize("fault", [change_weight, change_scale, change_zero_point, change_activation_scale])
def test_planted_faults_are_found(
    full: Path, narrow: Callable[[Kind], Path], fault: Callable[[onnx.ModelProto], None]
) -> None:
    twin, model = onnx.load(full), onnx.load(narrow("int8"))
    assert checks.first_difference(twin, model) is None
    fault(model)
    assert "is not the rounded one" in str(checks.first_difference(twin, model))


def test_a_product_that_was_left_out_is_found(full: Path, narrow: Callable[[Kind], Path]) -> None:
    model, lost = onnx.load(narrow("int8")), stated_lost(narrow("int8"))
    assert checks.first_float(layers(ir.load(full).graph, (), lost), ir.from_proto(model)) is None
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    pairs = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type.endswith("tizeLinear")}
    conv.input[0] = pairs[pairs[conv.input[0]]]
    left_out = checks.first_float(layers(ir.load(full).graph, (), lost), ir.from_proto(model))
    assert left_out == f"Conv {conv.name} is not quantised"
