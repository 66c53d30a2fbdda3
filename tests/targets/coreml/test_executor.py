import functools
from collections.abc import Callable
from pathlib import Path

import coremltools as ct
import coremltools.optimize as cto
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coreml_packages import Tiny, converted, saved, seeded
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import get_new_symbol, types
from coremltools.proto import MIL_pb2, Model_pb2
from torch import nn

from mobilemix.errors import InputError, UnsupportedOpError
from mobilemix.targets.coreml.executor import Executor
from mobilemix.targets.coreml.package import Package, read_package

FP32_TOLERANCE = 1e-6
FP16_TOLERANCE = 2e-3
PARTS_TOLERANCE = 1e-5
"""coremltools writes some constants, such as 1/6 in hardswish, with fewer digits than float32 has."""
MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
PRECISIONS = [ct.precision.FLOAT32, ct.precision.FLOAT16]
BUILDS = [
    (ct.target.iOS15, ct.precision.FLOAT32),
    (ct.target.iOS16, ct.precision.FLOAT16),
    (ct.target.iOS17, ct.precision.FLOAT16),
    (ct.target.iOS18, ct.precision.FLOAT32),
]


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def check(
    module: nn.Module, arguments: tuple[torch.Tensor, ...], folder: Path, tolerance: float, **options: object
) -> Package:
    """Convert, save, read back, execute, and compare with `module`."""
    with torch.no_grad():
        expected = module(*arguments)
    exact = options.get("compute_precision") != ct.precision.FLOAT16
    package = read_package(saved(converted(module, arguments, **options), folder / "m.mlpackage"))
    feeds = {name: value.numpy() for name, value in zip(package.inputs, arguments, strict=True)}
    outputs = Executor(package, rounding="none" if exact else "fp16").run(feeds)
    expected = expected if isinstance(expected, tuple) else (expected,)
    assert len(outputs) == len(expected)
    for actual, reference in zip(outputs.values(), expected, strict=True):
        assert actual.shape == reference.shape
        assert relative(actual, reference.numpy()) < (tolerance if exact else FP16_TOLERANCE)
    return package


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    torch.manual_seed(0)  # what three bits leave of a model depends on its weights
    return seeded(Tiny())


@pytest.fixture(scope="module")
def packages(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packages")
    return {
        name: saved(converted(tiny, (noise(1, 3, 16, 16),), compute_precision=precision), folder / f"{name}.mlpackage")
        for name, precision in zip(("fp32", "fp16"), PRECISIONS, strict=True)
    }


@pytest.mark.parametrize(("target", "precision"), BUILDS)
def test_round_trip_of_a_network(tiny: nn.Module, tmp_path: Path, target: ct.target, precision: ct.precision) -> None:
    options = {"minimum_deployment_target": target, "compute_precision": precision}
    check(tiny, (noise(2, 3, 16, 16),), tmp_path, FP32_TOLERANCE, **options)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).reshape(2, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Fourier(nn.Module):
    """Products with transform matrices, softshrink as x − clip(x), and a split: what frequency mixers become."""

    def __init__(self) -> None:
        super().__init__()
        angles = 2 * torch.pi * torch.outer(torch.arange(5.0), torch.arange(8.0)) / 8
        self.register_buffer("matrix", torch.cat([angles.cos(), -angles.sin()]).T.contiguous())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        real, imaginary = (x @ self.matrix).split(5, dim=-1)
        shrunk = torch.cat([real - real.clamp(-0.5, 0.5), imaginary[..., 1:4]], -1)
        return (shrunk @ self.matrix.T[:8]) / (1 + shrunk.pow(2).sum(-1, keepdim=True)).sqrt()


class Resampling(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            F.interpolate(x, scale_factor=2, mode="bilinear"),
            F.interpolate(x, scale_factor=2, mode="nearest"),
            F.pixel_shuffle(x, 2),
            F.avg_pool2d(F.pad(x, (1, 0, 2, 1), mode="reflect"), 3, 2, 1, ceil_mode=True, count_include_pad=False),
            F.max_pool2d(x, 3, 2, 1),
            F.adaptive_avg_pool2d(x, 2),
        )


class Indexing(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            x[:, 1::2, ..., -3:],
            x.flip(1).roll(1, 2),
            x.cumsum(2),
            torch.stack([x.amax(1), x.sum(1), x.argmax(1).float()], 1),
            torch.where(x > 0, x, x.exp() - 1),
            torch.einsum("bchw,bcij->bhwij", x, x)[:, :2].flatten(3),
        )


class Norms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(2, 8)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.act = nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 4, 3, 2, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.instance(F.hardswish(self.group(x)))
        # Spelled out, because coremltools 9 converts an exported gelu(approximate="tanh") as the exact one.
        tanh_gelu = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
        x = F.softplus(self.act(x)) * F.hardsigmoid(x) + tanh_gelu
        return F.normalize(self.up(F.leaky_relu(x, 0.1)), dim=1)


MODULES = {
    "attention": (Attention, (2, 6, 16)),
    "fourier": (Fourier, (2, 3, 8)),
    "resampling": (Resampling, (1, 8, 6, 7)),
    "indexing": (Indexing, (1, 4, 6, 6)),
    "norms": (Norms, (1, 8, 6, 7)),
}


@pytest.mark.parametrize(("target", "precision"), [BUILDS[0], (ct.target.iOS18, ct.precision.FLOAT16)])
@pytest.mark.parametrize("name", MODULES)
def test_round_trip_of_parts(name: str, target: ct.target, precision: ct.precision, tmp_path: Path) -> None:
    build, shape = MODULES[name]
    options = {"minimum_deployment_target": target, "compute_precision": precision}
    package = check(seeded(build()), (noise(*shape),), tmp_path, PARTS_TOLERANCE, **options)
    if name == "attention":
        fused = any(each.type == "scaled_dot_product_attention" for each in package.operations)
        assert fused == (target == ct.target.iOS18)


def test_image_input_and_class_labels(tiny: nn.Module, tmp_path: Path) -> None:
    model = converted(
        tiny,
        (noise(1, 3, 16, 16),),
        inputs=[
            ct.ImageType(
                name="photo",
                shape=(1, 3, 16, 16),
                scale=1 / 127.5,
                bias=[-1, -0.9, -0.8],
                color_layout=ct.colorlayout.RGB,
            )
        ],
        classifier_config=ct.ClassifierConfig(["ash", "birch", "cedar", "elm", "fir"]),
    )
    package = read_package(saved(model, tmp_path / "m.mlpackage"))
    pixels = np.random.default_rng(0).uniform(0, 255, (1, 3, 16, 16)).astype(np.float32)
    normalised = torch.from_numpy(pixels) / 127.5 + torch.tensor([-1, -0.9, -0.8])[:, None, None]
    with torch.no_grad():
        expected = tiny(normalised)[0].numpy()
    outputs = Executor(package, rounding="none").run({"photo": pixels})
    label, scores = (outputs[name] for name in package.outputs)
    assert package.labels is not None
    assert str(label) == package.labels[int(expected.argmax())]
    assert relative(scores, expected) < 10 * FP32_TOLERANCE


def test_integer_class_labels(tiny: nn.Module, tmp_path: Path) -> None:
    model = converted(tiny, (noise(1, 3, 16, 16),), classifier_config=ct.ClassifierConfig([7, 8, 9, 10, 11]))
    package = read_package(saved(model, tmp_path / "m.mlpackage"))
    x = noise(1, 3, 16, 16)
    outputs = Executor(package, rounding="none").run({next(iter(package.inputs)): x.numpy()})
    assert package.labels == (7, 8, 9, 10, 11)
    assert int(outputs["classLabel"]) == 7 + int(tiny(x).argmax())


def test_rounding_follows_the_declared_types(packages: dict[str, Path]) -> None:
    package = read_package(packages["fp16"])
    feeds = {next(iter(package.inputs)): noise(1, 3, 16, 16).numpy()}
    declared = {output.name: output.dtype for each in package.operations for output in each.outputs}
    rounded = dict(Executor(package, rounding="fp16").values(feeds))
    exact = dict(Executor(package, rounding="none").values(feeds))
    assert rounded.keys() == exact.keys()
    assert [name for name in rounded if declared[name] == "fp16"]
    for name, value in rounded.items():
        if declared[name] == "fp16":
            np.testing.assert_array_equal(value, value.astype(np.float16).astype(np.float32))
    assert any((value != value.astype(np.float16)).any() for value in exact.values())


def test_fp16_overflows_to_infinity(tmp_path: Path) -> None:
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 300) * 300 / 300

    model = converted(Scale(), (noise(3),), compute_precision=ct.precision.FLOAT16)
    package = read_package(saved(model, tmp_path / "m.mlpackage"))
    feeds = {next(iter(package.inputs)): np.float32([0.5, 1, 100])}
    (rounded,) = Executor(package, rounding="fp16").run(feeds).values()
    (exact,) = Executor(package, rounding="none").run(feeds).values()
    assert np.isinf(rounded).tolist() == [False, True, True]
    np.testing.assert_allclose(exact, [150, 300, 30000], rtol=FP16_TOLERANCE)


def test_values_are_the_operations_in_order(packages: dict[str, Path]) -> None:
    package = read_package(packages["fp32"])
    executor = Executor(package, rounding="none")
    feeds = {next(iter(package.inputs)): noise(1, 3, 16, 16).numpy()}
    values = list(executor.values(feeds))
    computed = [output.name for each in package.operations if each.type != "const" for output in each.outputs]
    assert [name for name, _ in values] == computed
    np.testing.assert_array_equal(dict(values)[package.outputs[0]], executor.run(feeds)[package.outputs[0]])


def test_one_flipped_weight_bit_changes_the_output(packages: dict[str, Path]) -> None:
    path = packages["fp16"]
    package = read_package(path)
    feeds = {next(iter(package.inputs)): noise(1, 3, 16, 16).numpy()}
    (before,) = Executor(package, rounding="fp16").run(feeds).values()
    stored = [
        each.attributes["val"]
        for each in package.operations
        if each.type == "const" and each.attributes["val"].file_offset is not None
    ]
    content = (path / WEIGHTS).read_bytes()
    try:
        for constant in stored:
            damaged = bytearray(content)
            damaged[constant.file_offset + 1] ^= 0x04  # the exponent's lowest bit
            (path / WEIGHTS).write_bytes(damaged)
            (after,) = Executor(read_package(path), rounding="fp16").run(feeds).values()
            assert (before != after).any(), constant
    finally:
        (path / WEIGHTS).write_bytes(content)


def edited(source: Path, folder: Path, change: Callable[[Model_pb2.Model], object]) -> Package:
    spec = Model_pb2.Model.FromString((source / MODEL).read_bytes())
    change(spec)
    model = ct.models.MLModel(spec, weights_dir=str(source / "Data/com.apple.CoreML/weights"), skip_model_load=True)
    return read_package(saved(model, folder / "edited.mlpackage"))


def first(spec: Model_pb2.Model, kind: str) -> MIL_pb2.Operation:
    main = spec.mlProgram.functions["main"]
    return next(each for each in main.block_specializations[main.opset].operations if each.type == kind)


def _declare(kind: str, axis: int, size: int) -> Callable[[Model_pb2.Model], object]:
    def change(spec: Model_pb2.Model) -> None:
        first(spec, kind).outputs[0].type.tensorType.dimensions[axis].constant.size = size

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_declare("gelu", 2, 7), r"is declared \(1, 16, 7, 8\), its shape is \(1, 16, 8, 8\)"),
        (
            lambda spec: setattr(first(spec, "gelu").outputs[0].type.tensorType, "dataType", MIL_pb2.FLOAT16),
            "is declared fp16, its inputs make it fp32",
        ),
        (
            lambda spec: setattr(first(spec, "gelu").outputs[0].type.tensorType, "dataType", MIL_pb2.INT32),
            "is declared int32",
        ),
        (lambda spec: first(spec, "gelu").inputs.pop("x"), "gelu .* cannot be executed"),
        (
            lambda spec: first(spec, "gelu").inputs["gain"].CopyFrom(first(spec, "gelu").inputs["x"]),
            "gelu .* cannot be executed: .*gain",
        ),
        (lambda spec: setattr(first(spec, "gelu").inputs["x"].arguments.add(), "name", "x"), "2 arguments for 'x'"),
    ],
)
def test_contradictions_stop_at_their_operation(
    packages: dict[str, Path], tmp_path: Path, change: Callable[[Model_pb2.Model], object], message: str
) -> None:
    package = edited(packages["fp32"], tmp_path, change)
    feeds = {next(iter(package.inputs)): noise(1, 3, 16, 16).numpy()}
    with pytest.raises(InputError, match=message):
        Executor(package, rounding="none").run(feeds)


def test_operation_without_a_rule(packages: dict[str, Path], tmp_path: Path) -> None:
    package = edited(packages["fp32"], tmp_path, lambda spec: setattr(first(spec, "gelu"), "type", "random_normal"))
    with pytest.raises(UnsupportedOpError, match="random_normal"):
        Executor(package, rounding="none")


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "given were"),
        ({"y": np.zeros((1, 3, 16, 16), np.float32)}, "given were"),
        ({"x": np.zeros((1, 3, 16, 15), np.float32)}, "its shape is"),
        ({"x": np.zeros((1, 3, 16, 16), np.int32)}, "is declared fp32"),
    ],
)
def test_inputs_that_do_not_fit(packages: dict[str, Path], feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Executor(read_package(packages["fp32"]), rounding="none").run(feeds)


def test_inputs_are_left_alone(packages: dict[str, Path]) -> None:
    x = noise(1, 3, 16, 16).numpy()
    x.flags.writeable = False
    executor = Executor(read_package(packages["fp32"]), rounding="none")
    (once,) = executor.run({"x": x}).values()
    (twice,) = executor.run({"x": x}).values()
    np.testing.assert_array_equal(once, twice)


def test_size_known_at_run_time(tmp_path: Path) -> None:
    @mb.program(input_specs=[mb.TensorSpec(shape=(1, 3, get_new_symbol(), 8))], opset_version=ct.target.iOS16)
    def program(x):
        return mb.reduce_mean(x=mb.relu(x=x), axes=[2], keep_dims=False, name="y")

    model = ct.convert(
        program,
        inputs=[ct.TensorType(name="x", shape=(1, 3, ct.RangeDim(4, 16, default=8), 8))],
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    package = read_package(saved(model, tmp_path / "m.mlpackage"))
    assert package.inputs["x"].shape == (1, 3, None, 8)
    x = noise(1, 3, 11, 8).numpy()
    (y,) = Executor(package, rounding="none").run({"x": x}).values()
    np.testing.assert_allclose(y, np.maximum(x, 0).mean(2), rtol=1e-5, atol=1e-6)


LINEAR8 = cto.coreml.OpLinearQuantizerConfig(mode="linear_symmetric", weight_threshold=100)
ASYMMETRIC8 = cto.coreml.OpLinearQuantizerConfig(mode="linear", weight_threshold=100)
BLOCKS4 = cto.coreml.OpLinearQuantizerConfig(dtype="int4", granularity="per_block", block_size=16, weight_threshold=100)
SPARSE = cto.coreml.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=100)


def palette(bits: int, **options: object) -> cto.coreml.OpPalettizerConfig:
    return cto.coreml.OpPalettizerConfig(mode="uniform", nbits=bits, weight_threshold=100, **options)


COMPRESSIONS = {
    "linear8": ([(cto.coreml.linear_quantize_weights, LINEAR8)], ct.target.iOS16),
    "asymmetric8": ([(cto.coreml.linear_quantize_weights, ASYMMETRIC8)], ct.target.iOS16),
    "palette4": ([(cto.coreml.palettize_weights, palette(4))], ct.target.iOS16),
    "palette6": ([(cto.coreml.palettize_weights, palette(6))], ct.target.iOS16),
    "sparse": ([(cto.coreml.prune_weights, SPARSE)], ct.target.iOS16),
    "linear8-18": ([(cto.coreml.linear_quantize_weights, ASYMMETRIC8)], ct.target.iOS18),
    "blocks4-18": ([(cto.coreml.linear_quantize_weights, BLOCKS4)], ct.target.iOS18),
    "palette3-18": ([(cto.coreml.palettize_weights, palette(3))], ct.target.iOS18),
    "groups4-18": (
        [(cto.coreml.palettize_weights, palette(4, granularity="per_grouped_channel", group_size=8))],
        ct.target.iOS18,
    ),
    "sparse-18": ([(cto.coreml.prune_weights, SPARSE)], ct.target.iOS18),
    "sparse-linear8-18": (
        [(cto.coreml.prune_weights, SPARSE), (cto.coreml.linear_quantize_weights, LINEAR8)],
        ct.target.iOS18,
    ),
    "sparse-palette4-18": (
        [(cto.coreml.prune_weights, SPARSE), (cto.coreml.palettize_weights, palette(4))],
        ct.target.iOS18,
    ),
}


@pytest.fixture(scope="module")
def uncompressed(tiny: nn.Module) -> Callable[[ct.target], ct.models.MLModel]:
    return functools.cache(
        lambda target: converted(
            tiny,
            (noise(1, 3, 16, 16),),
            minimum_deployment_target=target,
            compute_precision=ct.precision.FLOAT16,
        )
    )


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_compressed_weights(tiny: nn.Module, uncompressed, tmp_path: Path, name: str) -> None:
    steps, target = COMPRESSIONS[name]
    x = noise(1, 3, 16, 16)
    model = uncompressed(target)
    for index, (compress, operation) in enumerate(steps):
        joint = {"joint_compression": True} if index else {}
        model = compress(model, cto.coreml.OptimizationConfig(global_config=operation), **joint)
    package = read_package(saved(model, tmp_path / "compressed.mlpackage"))
    assert any(each.type.startswith("constexpr_") for each in package.operations)
    dense = read_package(saved(cto.coreml.decompress_weights(model), tmp_path / "dense.mlpackage"))
    assert not any(each.type.startswith("constexpr_") for each in dense.operations)
    (compressed,) = Executor(package, rounding="fp16").run({"x": x.numpy()}).values()
    (expected,) = Executor(dense, rounding="fp16").run({"x": x.numpy()}).values()
    np.testing.assert_array_equal(compressed, expected)
    with torch.no_grad():
        assert 1e-4 < relative(compressed, tiny(x).numpy()) < 0.8


def constant_expression(
    build: Callable[[], object], opset: ct.target, folder: Path
) -> tuple[list[np.ndarray], set[str]]:
    """The values of compressed constants that `build` gives, executed from disk, and the types of their operations."""

    @mb.program(input_specs=[mb.TensorSpec(shape=(1,))], opset_version=opset)
    def program(x):
        return tuple(mb.add(x=x, y=each, name=f"y{i}") for i, each in enumerate(build()))

    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=opset,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    package = read_package(saved(model, folder / "m.mlpackage"))
    outputs = Executor(package, rounding="none").run({"x": np.zeros(1, np.float32)})
    return list(outputs.values()), {each.type for each in package.operations}


def test_constant_cast_on_load(tmp_path: Path) -> None:
    half = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float16)
    (values,), kinds = constant_expression(
        lambda: [mb.constexpr_cast(source_val=half, output_dtype="fp32")], ct.target.iOS16, tmp_path
    )
    assert "constexpr_cast" in kinds
    np.testing.assert_array_equal(values, half.astype(np.float32))


def test_tables_of_vectors(tmp_path: Path) -> None:
    """The operator documentation's second example."""
    indices = np.array([[[0, 0], [1, 0]], [[1, 1], [0, 0]]]).astype(types.np_uint1_dtype)
    table = np.float32([1, 2, 3, 4, 5, 6]).reshape(1, 1, 1, 2, 3)

    def build() -> list[object]:
        return [mb.constexpr_lut_to_dense(indices=indices, lut=table, vector_axis=np.int32(axis)) for axis in (1, 2)]

    (middle, last), _ = constant_expression(build, ct.target.iOS18, tmp_path)
    assert middle[0].T.tolist() == [[1, 2, 3, 4, 5, 6], [1, 2, 3, 1, 2, 3]]
    assert middle[1].T.tolist() == [[4, 5, 6, 1, 2, 3]] * 2
    assert last.tolist() == [[[1, 2, 3, 1, 2, 3], [4, 5, 6, 1, 2, 3]], [[4, 5, 6, 4, 5, 6], [1, 2, 3, 1, 2, 3]]]


def test_sparse_table_of_vectors(tmp_path: Path) -> None:
    """The operator documentation's example of vector palettisation."""
    mask = "110000 110001 011010 000100"
    bits = np.array([[int(each) for each in row] for row in mask.split()])

    def build() -> list[object]:
        expanded, values = mb.constexpr_lut_to_sparse(
            indices_mask=bits.astype(types.np_uint1_dtype),
            indices_nonzero_data=np.array([0, 1, 1, 0, 1, 1, 0, 0, 1]).astype(types.np_uint1_dtype),
            lut=np.float32([[2, 2.5], [3, 3.5]]).reshape(1, 1, 2, 2),
            vector_axis=np.int32(0),
        )
        return [mb.constexpr_sparse_to_dense(nonzero_data=values, mask=expanded)]

    (dense,), _ = constant_expression(build, ct.target.iOS18, tmp_path)
    looked_up = np.float32([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 3], [0, 3, 2, 0, 2, 0], [0, 0, 0, 3, 0, 0]])
    np.testing.assert_array_equal(dense[::2], looked_up)
    np.testing.assert_array_equal(dense[1::2], looked_up + 0.5 * bits)


def test_quantised_activations(tmp_path: Path) -> None:
    scale, weight = np.float32(0.05), noise(4, 6).numpy()

    @mb.program(input_specs=[mb.TensorSpec(shape=(2, 6), dtype=types.fp32)], opset_version=ct.target.iOS17)
    def program(x):
        quantised = mb.quantize(input=x, scale=scale, output_dtype="int8")
        return mb.linear(x=mb.dequantize(input=quantised, scale=scale), weight=weight)

    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32,
        skip_model_load=True,
    )
    package = read_package(saved(model, tmp_path / "m.mlpackage"))
    assert {"quantize", "dequantize"} <= {each.type for each in package.operations}
    x = noise(2, 6).numpy() * 4
    (y,) = Executor(package, rounding="none").run({"x": x}).values()
    assert relative(y, np.clip(np.round(x / scale), -128, 127) * scale @ weight.T) < FP32_TOLERANCE
