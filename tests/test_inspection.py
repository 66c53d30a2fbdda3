import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import coremltools as ct
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import SHAPE
from coremltools.converters.mil import Builder as mb
from onnx import TensorProto, helper
from torch import Tensor, nn

import mobilemix
from mobilemix.capture import capture
from mobilemix.errors import InputError
from mobilemix.inspection import ArtifactReport, ModelReport, inspect_artifact, inspect_model
from mobilemix.inspection.obstacles import StockCoreML, StockOnnx, find
from mobilemix.inspection.tables import describe
from mobilemix.manifest import dumps
from mobilemix.recipe import Recipe
from mobilemix.targets import is_installed

SIZES = tuple(map(int, SHAPE.split("x")))


class Function(nn.Module):
    """A function of the input and of a complex buffer, as a module."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function
        self.register_buffer("filter", torch.randn(4, 5, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.filter)


def assigned(x: Tensor, _: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, :2] = x[:, :2]
    y += 1
    return y


def inspected(module: nn.Module, *shape: int) -> ModelReport:
    return inspect_model(Recipe(model="module", input_shapes=(shape,)), module=module)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ModelReport:
    """Of the network that all tests share."""
    from conftest import NETWORK

    path = tmp_path_factory.mktemp("network") / "spectral_net.py"
    path.write_text(NETWORK)
    return inspect_model(Recipe(model=f"{path}:make", input_shapes=(SIZES,)))


def test_what_is_in_the_way_of_each_target_and_which_pass_handles_it(report: ModelReport) -> None:
    targets = {target.target: target for target in report.targets}
    coreml, onnx_, tensorrt = targets["coreml"], targets["onnx"], targets["tensorrt"]
    assert ("litert" in targets) == is_installed("litert")
    found = {one.operator: one for one in coreml.obstacles}
    assert found.keys() == {"fft_rfft2", "view_as_complex", "mul", "fft_irfft2"}
    assert {one.stops for one in coreml.obstacles} == {"coremltools"}
    assert found["view_as_complex"].handled_by == "fold_constants", "it is the filter's, a weight"
    assert {found[name].handled_by for name in ("fft_rfft2", "mul", "fft_irfft2")} == {"complex_to_real"}
    (place,) = found["fft_rfft2"].places
    assert "spectral_net.py:24 (spectrum = torch.fft.rfft2(x" in place
    assert onnx_.obstacles == ()
    assert {(one.operator, one.stops, one.handled_by) for one in tensorrt.obstacles} == {
        ("fft_rfft2", "TensorRT", "complex_to_real"),
        ("fft_irfft2", "TensorRT", "complex_to_real"),
    }
    assert all("DFT" in one.reason for one in tensorrt.obstacles)
    assert coreml.remaining == onnx_.remaining == tensorrt.remaining == ()
    assert "complex_to_real" in coreml.passes
    assert report.refusal is None


def test_what_the_network_costs(report: ModelReport) -> None:
    stem, head = 8 * 8 * 8 * 3 * 9, 8 * 4
    assert report.before.multiply_adds == stem + head
    assert report.after is not None
    assert report.after.multiply_adds > report.before.multiply_adds, "the transforms are matrix products now"
    assert report.parameters == (8 * 3 * 9 + 8) + 2 * 8 + 8 * 8 * 5 * 2 + (8 * 4 + 4)
    assert report.before.operators["fft_rfft2"] == 1
    assert not [name for name in report.after.operators if "fft" in name]
    assert sum(one.before.multiply_adds for one in report.contributors) == report.before.multiply_adds
    assert sum(one.after.multiply_adds for one in report.contributors) == report.after.multiply_adds


def test_inputs_and_outputs(report: ModelReport) -> None:
    assert [(one.name, one.dtype, one.shape) for one in report.inputs] == [("image", "float32", SIZES)]
    assert [(one.dtype, one.shape) for one in report.outputs] == [("float32", (1, 4))]


def test_activations_moved() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Flatten())
    report = inspected(module, 2, 3, 6)
    floats = 2 * 3 * (6 + 5) + 2 * 3 * (5 + 5)  # the linear map and the activation; to flatten moves nothing
    assert report.before.moved_bytes == 4 * floats
    assert report.before.weight_bytes == 4 * (6 * 5 + 5)


def test_a_module_of_torch_belongs_to_the_one_that_holds_it() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x)

    (one,) = inspected(nn.Sequential(Block()), 1, 3, 5, 5).contributors
    assert (one.module, one.before.operators, one.after.operators) == ("0", 2, 1)
    assert one.before.multiply_adds == one.after.multiply_adds == 3 * 4 * 25


def test_what_nothing_handles_remains() -> None:
    report = inspected(Function(lambda x, _: torch.special.i0(x)), 2, 3)
    for target in report.targets:
        assert [(one.operator, one.handled_by) for one in target.obstacles] == [("special_i0", None)]
        assert [one.operator for one in target.remaining] == ["special_i0"]
    assert report.refusal is None
    text = rendered(report)
    assert "blocked" in text
    assert "nothing is in the way" not in text


def test_what_litert_lacks(report: ModelReport) -> None:
    pytest.importorskip("litert_torch", reason="needs pip install 'mobilemix[litert]'")
    (litert,) = (target for target in report.targets if target.target == "litert")
    found = {(one.operator, one.handled_by) for one in litert.obstacles}
    assert {("fft_rfft2", "complex_to_real"), ("fft_irfft2", "complex_to_real")} <= found
    assert not litert.remaining


def test_what_the_passes_refuse_is_told_and_what_came_before_is_counted() -> None:
    def function(x: Tensor, _: Tensor) -> Tensor:
        return torch.linalg.inv(torch.fft.fft2(x)).real

    report = inspected(Function(function), 4, 4)
    assert report.refusal is not None
    assert "linalg_inv" in report.refusal
    assert "test_inspection.py" in report.refusal
    assert report.after is None
    assert report.before.operators["fft_fft2"] == 1
    assert all(one.handled_by is None for one in report.targets[0].obstacles if one.operator != "view")
    assert "passes stop" in rendered(report)


def test_scans_are_obstacles_that_scan_passes_handle() -> None:
    report = inspected(Function(lambda x, _: torch.ops.mobilemix.linear_scan(x.sigmoid(), x)), 6, 2, 3)
    for target in report.targets:
        (one,) = target.obstacles
        assert one.operator == "mobilemix::linear_scan"
        assert one.handled_by in ("lower_linear_scan", "the onnx target's converter")
        assert target.remaining == ()


def rendered(report: ModelReport | ArtifactReport) -> str:
    from rich.console import Console

    console = Console(width=200, no_color=True)
    with console.capture() as capture_:
        for line in describe(report):
            console.print(line)
    return capture_.get()


def test_tables_and_json_say_it(report: ModelReport) -> None:
    text = rendered(report)
    for part in ("fft_rfft2", "complex_to_real", "multiply-adds", "nothing is in the way", "spectral_net.py:24"):
        assert part in text
    assert '"handled_by": "complex_to_real"' in dumps(report)


# What the stock exporters refuse, each checked below against the exporter itself.
CASES: dict[str, tuple[Callable[..., Tensor], tuple[int, ...], set[str], set[str]]] = {
    "global filter": (
        lambda x, k: torch.fft.irfft2(torch.fft.rfft2(x) * k, s=x.shape[-2:]),
        (1, 2, 4, 8),
        {"fft_rfft2", "mul", "fft_irfft2"},
        set(),
    ),
    "one-dimensional transform": (lambda x, _: torch.fft.rfft(x).abs(), (1, 8), {"fft_rfft"}, set()),
    "spectrogram": (lambda x, _: torch.stft(x, 16, return_complex=True).abs(), (1, 64), set(), set()),
    "shift": (lambda x, _: torch.fft.fftshift(x), (1, 8), {"fft_fftshift"}, set()),
    "complex exponential": (
        lambda x, _: torch.view_as_real(torch.view_as_complex(x).exp()),
        (3, 2),
        {"view_as_complex", "exp"},
        {"exp"},
    ),
    "scan": (
        lambda x, _: torch.ops.mobilemix.linear_scan(x.sigmoid(), x),
        (6, 2, 3),
        {"mobilemix::linear_scan"},
        {"mobilemix::linear_scan"},
    ),
    "Bessel function": (lambda x, _: torch.special.i0(x), (3,), {"special_i0"}, {"special_i0"}),
    "softshrink": (lambda x, _: F.softshrink(x), (3, 4), set(), set()),
    "assignment": (assigned, (3, 4), set(), set()),
    "composites": (
        lambda x, _: F.gelu(F.layer_norm(x.chunk(2, 1)[0], (4,))).unflatten(-1, (2, 2)).flatten(1),
        (3, 4, 4),
        set(),
        set(),
    ),
    "norms": (
        lambda x, _: F.group_norm(F.batch_norm(x, torch.zeros(4), torch.ones(4)), 2),
        (1, 4, 5, 5),
        set(),
        set(),
    ),
    "Einstein sum": (lambda x, _: torch.einsum("bij,bkj->bik", x, x), (1, 3, 4), set(), set()),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_registries_say(name: str) -> None:
    function, shape, coreml, onnx_ = CASES[name]
    program = capture(Function(function), (torch.rand(shape),))
    assert {operator for operator, _, _ in find(program, StockCoreML())} == coreml
    assert {operator for operator, stops, _ in find(program, StockOnnx()) if stops == "torch.onnx"} == onnx_


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_stock_exporters_do_what_their_registries_say(name: str) -> None:
    function, shape, coreml, onnx_ = CASES[name]
    module, x = Function(function).eval(), torch.rand(shape)
    outcomes = []
    for convert in (
        lambda: ct.convert(
            torch.export.export(module, (x,)).run_decompositions({}),
            minimum_deployment_target=ct.target.iOS16,
            skip_model_load=True,
        ),
        lambda: torch.onnx.export(module, (x,), dynamo=True, verbose=False),
    ):
        try:
            convert()
            outcomes.append(True)
        except Exception:
            outcomes.append(False)
    assert outcomes == [not coreml, not onnx_]


def onnx_file(path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], *shape: int | str) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), path)
    return path


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("node", "weight", "shape", "macs"),
    [
        (helper.make_node("Conv", ["x", "w"], ["y"], group=2), ones(6, 2, 3, 3), (1, 4, 8, 8), 6 * 36 * 2 * 9),
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"]), ones(4, 6, 2, 2), (1, 4, 5, 5), 4 * 25 * 6 * 4),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), ones(5, 7), (2, 3, 5), 2 * 3 * 5 * 7),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transA=1), ones(5, 7), (5, 3), 3 * 5 * 7),
        (
            helper.make_node("Einsum", ["x", "w"], ["y"], equation="bij, jk -> bik"),
            ones(4, 5),
            (2, 3, 4),
            2 * 3 * 4 * 5,
        ),
        (helper.make_node("Add", ["x", "w"], ["y"]), ones(5), (2, 5), 0),
    ],
    ids=lambda value: value.op_type if isinstance(value, onnx.NodeProto) else "",
)
def test_multiply_adds_of_onnx_nodes(
    tmp_path: Path, node: onnx.NodeProto, weight: np.ndarray, shape: tuple[int, ...], macs: int
) -> None:
    report = inspect_artifact(onnx_file(tmp_path / "model.onnx", [node], {"w": weight}, *shape))
    assert report.cost.multiply_adds == macs
    assert report.cost.weight_bytes == weight.nbytes
    assert report.weight_dtypes == {"float32": weight.nbytes}
    output = report.outputs[0].shape
    assert report.cost.moved_bytes == 4 * (math.prod(shape) + math.prod(output))  # type: ignore[arg-type]


def test_sizes_that_are_open_leave_costs_unknown(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    report = inspect_artifact(onnx_file(tmp_path / "model.onnx", [node], {"w": ones(5, 7)}, "batch", 5))
    assert report.cost.multiply_adds is None
    assert report.inputs[0].shape == ("batch", 5)
    assert "unknown" in rendered(report)


def test_a_scan_counts_once_for_each_step(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("MatMul", ["h", "w"], ["next"]), helper.make_node("Add", ["next", "x_t"], ["state"])],
        "body",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 4)) for name in ("h", "x_t")],
        [helper.make_tensor_value_info("state", TensorProto.FLOAT, (1, 4))],
    )
    node = helper.make_node("Scan", ["h0", "x"], ["y"], num_scan_inputs=1, body=body)
    weights = {"h0": ones(1, 4), "w": ones(4, 4)}
    report = inspect_artifact(onnx_file(tmp_path / "model.onnx", [node], weights, 9, 1, 4))
    assert report.cost.multiply_adds == 9 * 4 * 4
    assert report.cost.operators == {"Scan": 1, "MatMul": 1, "Add": 1}
    assert [(one.operator, one.stops) for one in report.obstacles] == [("Scan", "Core ML, most accelerators")]


def test_what_other_runtimes_lack_of_an_onnx_file(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DFT", ["x"], ["f"], axis=1),
        helper.make_node("[red]Own", ["f"], ["y"], domain="com.example"),
    ]
    report = inspect_artifact(onnx_file(tmp_path / "model.onnx", nodes, {}, 1, 8, 1))
    assert {(one.operator, one.stops) for one in report.obstacles} == {
        ("DFT", "TensorRT"),
        ("com.example::[red]Own", "every other runtime"),
    }
    assert report.provenance is None
    assert "com.example::[red]Own" in rendered(report), "names are not markup"


def test_multiply_adds_of_core_ml_operations(tmp_path: Path) -> None:
    @mb.program(input_specs=[mb.TensorSpec((1, 4, 8, 8))], opset_version=ct.target.iOS18)
    def program(x):  # type: ignore[no-untyped-def]
        image = mb.conv(x=x, weight=ones(6, 2, 3, 3), groups=2)  # (1, 6, 6, 6)
        image = mb.conv_transpose(x=image, weight=ones(6, 3, 2, 2))  # (1, 3, 7, 7)
        rows = mb.linear(x=image, weight=ones(5, 7))  # (1, 3, 7, 5)
        gram = mb.matmul(x=rows, y=rows, transpose_x=True)  # (1, 3, 5, 5)
        mixed = mb.einsum(values=(gram, ones(1, 5, 5, 5)), equation="abcd,adce->abce")
        return mb.scaled_dot_product_attention(query=mixed, key=gram, value=gram)

    path = tmp_path / "model.mlpackage"
    options = {"compute_precision": ct.precision.FLOAT32, "skip_model_load": True}
    ct.convert(program, minimum_deployment_target=ct.target.iOS18, **options).save(str(path))
    report = inspect_artifact(path)
    expected = 6 * 36 * 2 * 9 + 6 * 36 * 3 * 4 + 3 * 49 * 5 + 3 * 25 * 7 + 3 * 125 + 3 * 2 * 125
    assert report.cost.multiply_adds == expected
    assert report.form == "ML Program for iOS 18"
    assert report.inputs[0].shape == (1, 4, 8, 8)
    assert report.weight_dtypes["fp32"] >= 4 * (6 * 2 * 9 + 6 * 3 * 4 + 35)


def test_artifacts_of_ours(network: str, report: ModelReport, tmp_path: Path) -> None:
    for target, dtype in (("onnx", "float32"), ("coreml", "fp16")):
        made = mobilemix.export(network, target=target, output=tmp_path, input_shapes=(SIZES,))
        found = inspect_artifact(made.path)
        assert report.after is not None
        assert found.cost.multiply_adds == report.after.multiply_adds
        assert found.cost.operators == made.manifest.artifact["operators"]
        assert max(found.weight_dtypes, key=found.weight_dtypes.get) == dtype  # type: ignore[arg-type]
        assert found.bytes == made.manifest.artifact["bytes"]
        assert found.provenance is not None
        assert found.provenance["model"]["name"] == "make"
        assert found.obstacles == ()
        assert [one.name for one in found.inputs] == ["image"]
        assert "logits" in [one.name for one in found.outputs]
        assert "weights_sha256" in rendered(found)


def test_what_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no artifact"):
        inspect_artifact(tmp_path / "nowhere.onnx")
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(InputError, match="ONNX model"):
        inspect_artifact(tmp_path / "text.onnx")
    with pytest.raises(InputError, match="not a Core ML package"):
        inspect_artifact(tmp_path)


def test_reports_are_frozen(report: ModelReport) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.model = "another"  # type: ignore[misc]
