"""Every rule against ONNX Runtime's kernel for the operator, on nodes of one kind and of any shape."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mobilemix.errors import UnsupportedOpError
from mobilemix.targets.onnx.onnx_ops import RULES
from mobilemix.targets.onnx.onnx_ops.elementwise import BINARY, UNARY, VARIADIC
from mobilemix.targets.onnx.onnx_ops.reduction import REDUCTIONS
from mobilemix.targets.onnx.torch_graph import simulate

ROUNDING = 2e-5
"""Absolute and relative, of float32 kernels."""
SIZES = st.integers(1, 5)
COMPARISONS = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"}
LOGICAL = {"And", "Or", "Xor", "Not"}
POSITIVE = {"Log", "Reciprocal", "Sqrt"}

seldom = settings(max_examples=12, deadline=None)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes") / "node.onnx"


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def whole(low: int, high: int, *shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, shape).astype(dtype)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def write(path: Path, nodes: list[onnx.NodeProto], given: dict[str, object], constants: dict[str, object]) -> None:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in given.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in nodes[-1].output if name]
    tensors = [
        value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(value, name)
        for name, value in constants.items()
    ]
    graph = helper.make_graph(nodes, "node", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)


def compare(path: Path, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The file's outputs in the simulation, equal to ONNX Runtime's."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    expected = dict(zip([output.name for output in session.get_outputs()], session.run(None, given), strict=True))
    found, _ = simulate(path).follow(given, {}, ())
    assert list(found) == list(expected)
    for name, value in found.items():
        assert value.shape == expected[name].shape
        assert (value.dtype.kind, value.dtype.kind == "f" or value.dtype) == (
            expected[name].dtype.kind,
            value.dtype.kind == "f" or expected[name].dtype,
        )
        np.testing.assert_allclose(value, expected[name], rtol=ROUNDING, atol=ROUNDING)
    return list(found.values())


def check(
    path: Path, operator: str, *inputs: np.ndarray | None, outputs: int = 1, fixed: bool = False, **attributes: object
) -> list[np.ndarray]:
    """One node with these inputs, the first of which is fed, and the rest too unless `fixed`."""
    names = ["" if value is None else f"input_{index}" for index, value in enumerate(inputs)]
    node = helper.make_node(operator, names, [f"output_{index}" for index in range(outputs)], **attributes)
    arrays = {name: np.asarray(value) for name, value in zip(names, inputs, strict=True) if value is not None}
    given = {name: value for name, value in arrays.items() if not fixed or name == "input_0"}
    write(path, [node], given, {name: value for name, value in arrays.items() if name not in given})
    return compare(path, given)


@pytest.mark.parametrize("operator", sorted(UNARY))
@seldom
@given(st.lists(SIZES, max_size=4))
def test_unary(path: Path, operator: str, shape: list[int]) -> None:
    value = 3 * noise(*shape)
    if operator in POSITIVE:
        value = np.abs(value) + np.float32(0.1)
    check(path, operator, value > 0 if operator in LOGICAL else value)


@pytest.mark.parametrize("operator", sorted(BINARY))
@seldom
@given(st.lists(SIZES, min_size=2, max_size=4), st.integers(0, 3), st.booleans())
def test_binary_broadcasts(path: Path, operator: str, shape: list[int], flat: int, swapped: bool) -> None:
    other = [1 if axis == flat else size for axis, size in enumerate(shape)][flat > 1 :]
    first, second = noise(*shape), noise(*other, seed=1)
    if operator in COMPARISONS:
        first, second = np.rint(first), np.rint(second)
    if operator in {"Div", "Pow"}:
        first, second = np.abs(first) + np.float32(0.5), np.abs(second) + np.float32(0.5)
    if operator in LOGICAL:
        first, second = first > 0, second > 0
    check(path, operator, *((second, first) if swapped else (first, second)))


@pytest.mark.parametrize("operator", sorted(VARIADIC))
def test_variadic(path: Path, operator: str) -> None:
    check(path, operator, noise(2, 3), noise(3, seed=1), noise(1, 1, seed=2))


def test_integers_divide_towards_zero(path: Path) -> None:
    (quotient,) = check(path, "Div", ints(7, -7, 6), ints(2, 2, 3))
    assert quotient.tolist() == [3, -3, 2]


@pytest.mark.parametrize("fmod", [0, 1])
def test_remainders(path: Path, fmod: int) -> None:
    check(path, "Mod", ints(7, -7, 7, -7), ints(3, 3, -3, -3), fmod=fmod)


@pytest.mark.parametrize(
    ("operator", "attributes"),
    [
        ("Elu", {"alpha": 0.7}),
        ("Gelu", {}),
        ("Gelu", {"approximate": "tanh"}),
        ("HardSigmoid", {}),
        ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
        ("LeakyRelu", {"alpha": 0.2}),
        ("Shrink", {"lambd": 0.4, "bias": 0.1}),
    ],
)
def test_activations(path: Path, operator: str, attributes: dict[str, object]) -> None:
    check(path, operator, 3 * noise(2, 3, 4), **attributes)


def test_prelu_and_where(path: Path) -> None:
    check(path, "PRelu", noise(2, 3, 4), noise(3, 1, seed=1))
    check(path, "Where", noise(2, 3) > 0, noise(2, 3, seed=1), noise(3, seed=2))


@pytest.mark.parametrize("ends", [(-0.5, 0.5), (None, 0.5), (-0.5, None)])
def test_clip(path: Path, ends: tuple[float | None, float | None]) -> None:
    check(path, "Clip", noise(3, 4), *(None if end is None else np.float32(end) for end in ends))


@seldom
@given(
    rank=st.integers(1, 3),
    size=st.integers(5, 8),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pads=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
)
def test_convolutions(
    path: Path,
    rank: int,
    size: int,
    kernel: int,
    stride: int,
    dilation: int,
    pads: list[int],
    groups: int,
    bias: bool,
) -> None:
    x, weight = noise(2, 4, *[size] * rank), noise(8, 4 // groups, *[kernel] * rank, seed=1)
    attributes = {"group": groups, "strides": [stride] * rank, "dilations": [dilation] * rank, "pads": pads[: 2 * rank]}
    check(path, "Conv", x, weight, *([noise(8, seed=2)] if bias else []), **attributes)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (2, 1), (4, 2), (3, 2)])
def test_windows_that_are_padded_by_rule(path: Path, auto_pad: str, kernel: int, stride: int) -> None:
    options = {"auto_pad": auto_pad, "strides": [stride, stride]}
    check(path, "Conv", noise(1, 2, 7, 6), noise(3, 2, kernel, kernel), **options)
    check(path, "MaxPool", noise(1, 2, 7, 6), kernel_shape=[kernel, kernel], **options)


@seldom
@given(
    rank=st.integers(1, 2),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pads=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    groups=st.sampled_from([1, 2]),
    extra=st.integers(0, 1),
)
def test_transposed_convolutions(
    path: Path, rank: int, stride: int, dilation: int, pads: list[int], groups: int, extra: int
) -> None:
    x, weight, bias = noise(1, 4, *[5] * rank), noise(4, 3, *[3] * rank, seed=1), noise(3 * groups, seed=2)
    extras = {"output_padding": [extra] * rank} if extra < stride else {}
    attributes = {"group": groups, "strides": [stride] * rank, "dilations": [dilation] * rank, **extras}
    check(path, "ConvTranspose", x, weight, bias, pads=pads[: 2 * rank], **attributes)


@pytest.mark.parametrize("operator", ["AveragePool", "MaxPool"])
@seldom
@given(
    rank=st.integers(1, 2),
    size=st.integers(5, 9),
    kernel=st.integers(2, 3),
    stride=st.integers(1, 3),
    pads=st.lists(st.integers(0, 1), min_size=4, max_size=4),
    ceil=st.integers(0, 1),
    counted=st.integers(0, 1),
)
def test_pools(
    path: Path, operator: str, rank: int, size: int, kernel: int, stride: int, pads: list[int], ceil: int, counted: int
) -> None:
    own = {"count_include_pad": counted} if operator == "AveragePool" else {"dilations": [1 + counted] * rank}
    attributes = {"kernel_shape": [kernel] * rank, "strides": [stride] * rank, "ceil_mode": ceil, **own}
    check(path, operator, noise(1, 2, *[size] * rank), pads=pads[: 2 * rank], **attributes)


def test_global_average_pool(path: Path) -> None:
    check(path, "GlobalAveragePool", noise(2, 3, 4, 5))


@seldom
@given(st.lists(SIZES, max_size=2), SIZES, SIZES, SIZES, st.booleans())
def test_matrix_products(path: Path, batch: list[int], rows: int, inner: int, columns: int, shared: bool) -> None:
    check(path, "MatMul", noise(*batch, rows, inner), noise(*([] if shared else batch), inner, columns, seed=1))


@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("bias", [None, (5,), (3, 1), ()])
def test_gemm(path: Path, transposed: tuple[int, int], bias: tuple[int, ...] | None) -> None:
    a, b = noise(3, 4), noise(4, 5, seed=1)
    inputs = [a.T.copy() if transposed[0] else a, b.T.copy() if transposed[1] else b]
    inputs += [] if bias is None else [noise(*bias, seed=2)]
    check(path, "Gemm", *inputs, transA=transposed[0], transB=transposed[1], alpha=0.5, beta=2.0)


def test_einsum(path: Path) -> None:
    check(path, "Einsum", noise(2, 3, 4), noise(3, 4, 5, seed=1), equation="bgi,gio->bgo")


@pytest.mark.parametrize("options", [{}, {"exclusive": 1}, {"reverse": 1}, {"exclusive": 1, "reverse": 1}])
def test_cumulative_sums(path: Path, options: dict[str, int]) -> None:
    check(path, "CumSum", noise(3, 4), np.array(-1, np.int64), **options)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_to_space(path: Path, mode: str) -> None:
    check(path, "DepthToSpace", noise(2, 8, 3, 4), blocksize=2, mode=mode)


@pytest.mark.parametrize("operator", sorted(REDUCTIONS))
@seldom
@given(st.lists(SIZES, min_size=1, max_size=4), st.sets(st.integers(-4, 3)), st.integers(0, 1), st.integers(0, 1))
def test_reductions(path: Path, operator: str, shape: list[int], axes: set[int], keepdims: int, noop: int) -> None:
    rank = len(shape)
    valid = {axis % rank: axis for axis in axes if -rank <= axis < rank}
    options = {"keepdims": keepdims, "noop_with_empty_axes": noop}
    check(path, operator, noise(*shape), *([ints(*valid.values())] if valid else []), fixed=True, **options)


@pytest.mark.parametrize("last", [0, 1])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_argmax(path: Path, last: int, keepdims: int) -> None:
    value = whole(0, 3, 4, 6, dtype=np.float32)
    check(path, "ArgMax", value, axis=-1, select_last_index=last, keepdims=keepdims)


@pytest.mark.parametrize("operator", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_softmaxes(path: Path, operator: str, axis: int) -> None:
    check(path, operator, 3 * noise(2, 3, 4), axis=axis)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_normalization(path: Path, axis: int, bias: bool) -> None:
    shape = (2, 3, 8)[axis:]
    inputs = [noise(2, 3, 8), noise(*shape, seed=1), *([noise(*shape, seed=2)] if bias else [])]
    check(path, "LayerNormalization", *inputs, axis=axis, epsilon=1e-3)


def test_normalisations_of_channels(path: Path) -> None:
    x, scale, bias = noise(2, 4, 3, 5), noise(4, seed=1), noise(4, seed=2)
    check(path, "InstanceNormalization", x, scale, bias, epsilon=1e-3)
    check(path, "GroupNormalization", x, scale, bias, num_groups=2, epsilon=1e-3)
    check(path, "BatchNormalization", x, scale, bias, noise(4, seed=3), np.abs(noise(4, seed=4)), epsilon=1e-3)


@pytest.mark.parametrize("shape", [(4, 6), (0, -1), (2, 0, 4), (-1,)])
def test_reshape(path: Path, shape: tuple[int, ...]) -> None:
    check(path, "Reshape", noise(2, 3, 4), ints(*shape), fixed=True)


def test_reshape_of_nothing(path: Path) -> None:
    check(path, "Reshape", noise(0, 3), ints(3, 0), fixed=True, allowzero=1)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, 3])
def test_flatten(path: Path, axis: int) -> None:
    check(path, "Flatten", noise(2, 3, 4), axis=axis)


def test_axes_that_move_come_and_go(path: Path) -> None:
    check(path, "Transpose", noise(2, 3, 4), perm=[2, 0, 1])
    check(path, "Transpose", noise(2, 3, 4))
    check(path, "Squeeze", noise(2, 1, 3, 1), ints(-1), fixed=True)
    check(path, "Squeeze", noise(2, 1, 3, 1))
    check(path, "Unsqueeze", noise(2, 3), ints(-1, 0), fixed=True)
    check(path, "Expand", noise(3, 1), ints(2, 1, 4), fixed=True)
    check(path, "Expand", noise(3, 4), ints(1, 1), fixed=True)
    check(path, "Tile", noise(2, 3), ints(2, 3), fixed=True)


@pytest.mark.parametrize("part", [{}, {"start": 1}, {"end": -1}, {"start": -2, "end": 3}])
def test_shape(path: Path, part: dict[str, int]) -> None:
    check(path, "Shape", noise(2, 3, 4), **part)


def test_parts(path: Path) -> None:
    check(path, "Concat", noise(2, 3), noise(2, 1, seed=1), noise(2, 2, seed=2), axis=-1)
    check(path, "Split", noise(2, 7), ints(3, 4), fixed=True, outputs=2, axis=1)
    check(path, "Split", noise(2, 7), outputs=3, axis=1, num_outputs=3)


@settings(max_examples=40, deadline=None)
@given(st.integers(-9, 9), st.integers(-9, 9), st.sampled_from([-3, -2, -1, 1, 2, 3]), st.sampled_from([0, 1, -1]))
def test_slices_in_both_directions(path: Path, start: int, end: int, step: int, axis: int) -> None:
    check(path, "Slice", noise(5, 6), *(ints(value) for value in (start, end, axis, step)), fixed=True)


def test_slice_of_the_first_axes(path: Path) -> None:
    check(path, "Slice", noise(5, 6), ints(1, 2), ints(4, 100), fixed=True)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gathers(path: Path, axis: int) -> None:
    check(path, "Gather", noise(3, 4, 5), whole(-3, 3, 2, 2, dtype=np.int64), axis=axis)
    check(path, "Gather", noise(3, 4, 5), np.array(-1, np.int64), axis=axis)
    check(path, "GatherElements", noise(3, 4, 5), whole(-3, 3, 3, 4, 5, dtype=np.int64), axis=axis)


@pytest.mark.parametrize("reduction", ["none", "add"])
def test_scatter(path: Path, reduction: str) -> None:
    indices = np.array([[0, 1], [2, -1], [1, 3]], np.int64)
    check(path, "ScatterND", noise(3, 4, 2), indices, noise(3, 2, seed=1), reduction=reduction)


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
def test_pad(path: Path, mode: str) -> None:
    value = [np.float32(0.5)] if mode == "constant" else []
    check(path, "Pad", noise(2, 4, 5), ints(0, 1, 2, 0, 2, 1), *value, fixed=True, mode=mode)
    check(path, "Pad", noise(2, 4, 5), ints(1, 2), None, ints(-1), fixed=True, mode=mode)


def test_pad_crops(path: Path) -> None:
    check(path, "Pad", noise(4, 5), ints(-1, 0, 2, -2), fixed=True)


def test_constants_and_ranges(path: Path) -> None:
    check(path, "ConstantOfShape", ints(2, 3), value=numpy_helper.from_array(np.float32([0.5])))
    check(path, "ConstantOfShape", ints(2, 3), value=numpy_helper.from_array(ints(7)))
    check(path, "Range", *(np.array(value, np.int64) for value in (3, 11, 2)))
    for attributes in ({"value_ints": [1, 2]}, {"value_floats": [0.5, 1.5]}, {"value_int": 3}, {"value_float": 0.25}):
        constant = helper.make_node("Constant", [], ["constant"], **attributes)
        write(path, [constant, helper.make_node("Identity", ["constant"], ["output"])], {"x": noise(1)}, {})
        compare(path, {"x": noise(1)})


@pytest.mark.parametrize("to", ["FLOAT", "INT64", "INT32", "BOOL", "DOUBLE"])
def test_casts(path: Path, to: str) -> None:
    check(path, "Cast", 3 * noise(3, 4), to=getattr(TensorProto, to))
    check(path, "Cast", whole(0, 2, 3, 4, dtype=np.int64), to=getattr(TensorProto, to))


def test_half_precision_is_rounded_to(path: Path) -> None:
    narrow = helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16)
    write(path, [narrow, helper.make_node("Cast", ["half"], ["y"], to=TensorProto.FLOAT)], {"x": noise(3, 4)}, {})
    (found,) = compare(path, {"x": noise(3, 4)})
    np.testing.assert_array_equal(found, noise(3, 4).astype(np.float16))


def test_scan_reads_the_graph_around_it(path: Path) -> None:
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["state", "decay"], ["kept"]),
            helper.make_node("Add", ["kept", "now"], ["new"]),
            helper.make_node("Mul", ["new", "readout"], ["out"]),
        ],
        "step",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("state", "now")],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in ("new", "out")],
        [numpy_helper.from_array(noise(3, seed=2), "readout")],
    )
    scan = helper.make_node("Scan", ["start", "x"], ["last", "outputs"], body=body, num_scan_inputs=1)
    constants = {"decay": noise(3, seed=3), "start": noise(3, seed=1)}
    write(path, [scan], {"x": noise(6, 3)}, constants)
    compare(path, {"x": noise(6, 3)})


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@seldom
@given(st.lists(SIZES, min_size=2, max_size=3), st.integers(0, 1), st.booleans(), st.booleans())
def test_quantisation_there_and_back(
    path: Path, dtype: type, shape: list[int], axis: int, by_channel: bool, centred: bool
) -> None:
    size = [shape[axis]] if by_channel else []
    scale = np.abs(noise(*size, seed=1)) * np.float32(0.02) + np.float32(0.01)
    zero = [] if centred and dtype == np.uint8 else [whole(0, 100, *size, dtype=dtype)]
    numbers = check(path, "QuantizeLinear", noise(*shape), scale, *zero, fixed=True, axis=axis)
    check(path, "DequantizeLinear", numbers[0], scale, *zero, fixed=True, axis=axis)


def test_ties_are_rounded_to_even_in_float32(path: Path) -> None:
    pixels = np.arange(256, dtype=np.float32) / np.float32(127.5) - 1
    check(path, "QuantizeLinear", pixels, np.float32(2 / 255), np.uint8(128), fixed=True)


@pytest.mark.parametrize("data_type", [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8])
def test_blocks_have_scales_of_their_own(path: Path, data_type: int) -> None:
    numbers = helper.make_tensor("numbers", data_type, [64, 3], whole(0, 8, 192).tolist())
    constants = {"numbers": numbers, "scale": np.abs(noise(2, 3))}
    dequantise = helper.make_node("DequantizeLinear", ["numbers", "scale"], ["weight"], axis=0, block_size=32)
    write(path, [dequantise, helper.make_node("MatMul", ["x", "weight"], ["y"])], {"x": noise(2, 64)}, constants)
    compare(path, {"x": noise(2, 64)})


def test_eight_bit_floats(path: Path) -> None:
    zero = helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0])
    constants = {"scale": np.float32(0.01), "zero": zero}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["numbers"]),
        helper.make_node("DequantizeLinear", ["numbers", "scale"], ["y"]),
    ]
    write(path, nodes, {"x": 3 * noise(4, 50)}, constants)
    compare(path, {"x": 3 * noise(4, 50)})


@seldom
@given(st.lists(SIZES, min_size=1, max_size=3), st.sampled_from([-5.0, 0.0, 5.0]))
def test_dynamic_quantisation(path: Path, shape: list[int], centre: float) -> None:
    check(path, "DynamicQuantizeLinear", noise(*shape) + np.float32(centre), outputs=3)


def test_dynamic_quantisation_of_zeros(path: Path) -> None:
    check(path, "DynamicQuantizeLinear", np.zeros((2, 3), np.float32), outputs=3)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@seldom
@given(st.lists(SIZES, max_size=1), SIZES, SIZES, SIZES, st.booleans())
def test_integer_products(
    path: Path, dtype: type, batch: list[int], rows: int, inner: int, columns: int, by_column: bool
) -> None:
    a = whole(0, 256, *batch, rows, inner)
    b = whole(-128, 128, inner, columns, dtype=np.int8).astype(dtype)
    zeros = np.uint8(100), whole(1, 9, *([columns] if by_column else []), dtype=dtype)
    check(path, "MatMulInteger", a, b, *zeros, fixed=True)


@seldom
@given(st.sampled_from([1, 2]), st.integers(1, 2), st.integers(0, 1))
def test_integer_convolutions(path: Path, groups: int, stride: int, pad: int) -> None:
    x, weight = whole(0, 256, 1, 4, 6, 7), whole(0, 256, 6, 4 // groups, 3, 3)
    options = {"group": groups, "strides": [stride, stride], "pads": [pad, 0, 1, pad]}
    check(path, "ConvInteger", x, weight, np.uint8(100), np.uint8(120), fixed=True, **options)
    check(path, "ConvInteger", x, weight, **options)


def test_every_rule_is_tested() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    tables = {*UNARY, *BINARY, *VARIADIC, *REDUCTIONS}
    assert [operator for operator in RULES if operator not in tables and f'"{operator}"' not in source] == []


def test_an_operator_without_a_rule_is_named(path: Path) -> None:
    write(path, [helper.make_node("Det", ["x"], ["y"], name="head/det")], {"x": noise(2, 2)}, {})
    with pytest.raises(UnsupportedOpError, match="Det.*head/det"):
        simulate(path)


def test_an_attribute_that_a_rule_lacks_is_named(path: Path) -> None:
    node = helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT, round_mode="up")
    write(path, [node], {"x": noise(2, 2)}, {})
    with pytest.raises(UnsupportedOpError, match="Cast has no round_mode"):
        simulate(path)


def test_rounding_to_four_bits_is_refused(path: Path) -> None:
    constants = {"scale": np.float32(0.1), "zero": helper.make_tensor("zero", TensorProto.INT4, [], [0])}
    write(path, [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])], {"x": noise(2, 2)}, constants)
    with pytest.raises(UnsupportedOpError, match="4 bits"):
        simulate(path)


def test_floats_are_as_wide_as_asked_for(path: Path) -> None:
    write(path, [helper.make_node("Exp", ["x"], ["y"])], {"x": noise(2, 2)}, {})
    for dtype, expected in ((torch.float32, np.float32), (torch.float64, np.float64)):
        outputs, _ = simulate(path, dtype).follow({"x": noise(2, 2)}, {}, ())
        assert outputs["y"].dtype == expected
