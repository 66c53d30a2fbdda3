"""What the published list says of single nodes, held against NVIDIA's own parser where it is installed."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tensorrt_graphs import needs_rtx

from mobilemix.errors import InputError
from mobilemix.targets.tensorrt import bindings, builder, preflight

FLOATS = {"v": np.ones((1, 3, 8, 8), np.float32)}
SCALES = np.array([1, 1, 2, 2], np.float32)
CORNERS = np.array([0, 0, 0, 0, 1, 1, 1, 1], np.float32)
LATER = ("STFT", "BlackmanWindow", "HammingWindow", "HannWindow")
"""Operators that newer parsers have."""


def node(operator: str, *inputs: str, outputs: tuple[str, ...] = ("y",), **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, ["x", *inputs], outputs, name=f"block/{operator}", **attributes)


def file(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: Mapping[str, object] | None = None,
    shape: tuple[int, ...] = (1, 3, 8, 8),
    opset: int = 20,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def cast(dtype: int) -> list[onnx.NodeProto]:
    return [
        node("Cast", outputs=("c",), to=dtype),
        helper.make_node("Cast", ["c"], ["y"], name="back", to=TensorProto.FLOAT),
    ]


def quantised(zero: int) -> tuple[list[onnx.NodeProto], dict[str, object]]:
    nodes = [
        node("QuantizeLinear", "scale", "zero", outputs=("q",)),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], name="back"),
    ]
    return nodes, {"scale": np.float32(0.1), "zero": np.int8(zero)}


REFUSED = {
    "an operator": ([node("Det")], {}, "NVIDIA's parser does not have it"),
    "dilation": ([node("MaxPool", kernel_shape=[2, 2], dilations=[2, 2])], {}, "dilations other than 1"),
    "indices": ([node("MaxPool", outputs=("y", "i"), kernel_shape=[2, 2])], {}, "no output of indices"),
    "statistics": (
        [node("LayerNormalization", "s", outputs=("y", "m"))],
        {"s": np.ones(8, np.float32)},
        "only its first",
    ),
    "sums": (
        [node("ScatterND", "i", "v", reduction="add")],
        {"i": np.array([[0]]), **FLOATS},
        "reduction add is not taken",
    ),
    "antialias": ([node("Resize", "", "s", mode="linear", antialias=1)], {"s": SCALES}, "antialias 1 is not taken"),
    "corners": (
        [node("Resize", "r", "s", mode="linear", coordinate_transformation_mode="tf_crop_and_resize")],
        {"r": CORNERS, "s": SCALES},
        "coordinate_transformation_mode tf_crop_and_resize is not taken",
    ),
    "a zero point": (*quantised(3), "its zero point must be 0"),
    "bytes": (cast(TensorProto.UINT8), {}, "uint8 is no type of the values of a network"),
    "short integers": (cast(TensorProto.INT16), {}, "int16 is no type of the values of a network"),
}
TAKEN = {
    "pooling": ([node("MaxPool", kernel_shape=[2, 2])], {}),
    "one output": ([node("LayerNormalization", "s")], {"s": np.ones(8, np.float32)}),
    "assignment": ([node("ScatterND", "i", "v")], {"i": np.array([[0]]), **FLOATS}),
    "cubic": ([node("Resize", "", "s", mode="cubic")], {"s": SCALES}),
    "zero": quantised(0),
    "long integers": (cast(TensorProto.INT64), {}),
    "bfloat16": (cast(TensorProto.BFLOAT16), {}),
    "cumulative sum": ([node("CumSum", "a")], {"a": np.array(1)}),
    "largest": ([node("TopK", "k", outputs=("y", "i"))], {"k": np.array([3])}),
}


@pytest.mark.parametrize(("nodes", "constants", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_the_list_refuses_is_named(nodes, constants, reason, tmp_path: Path) -> None:
    first, *_ = preflight.preflight(file(tmp_path / "m.onnx", nodes, constants))
    assert (first.node, first.operator) == (nodes[0].name, nodes[0].op_type)
    assert reason in first.reason


@pytest.mark.parametrize(("nodes", "constants"), TAKEN.values(), ids=TAKEN)
def test_what_it_takes_is_let_pass(nodes, constants, tmp_path: Path) -> None:
    assert preflight.preflight(file(tmp_path / "m.onnx", nodes, constants)) == ()


@needs_rtx
def test_nvidia_s_parser_says_the_same(tmp_path: Path) -> None:
    for name, (nodes, constants, _) in REFUSED.items():
        assert builder.parse(file(tmp_path / "m.onnx", nodes, constants), "tensorrt-rtx"), name
    for name, (nodes, constants) in TAKEN.items():
        assert not builder.parse(file(tmp_path / "m.onnx", nodes, constants), "tensorrt-rtx"), name


@needs_rtx
def test_the_list_of_operators_is_that_of_the_parser() -> None:
    trt = bindings.rtx().module
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder_ = trt.Builder(logger)
    network = builder_.create_network(0)
    parser = trt.OnnxParser(network, logger)
    taken = {name for name in standard_operators() if parser.supports_operator(name)}
    assert preflight.LACKS & taken <= set(LATER)
    assert standard_operators() - taken - preflight.LACKS <= {"DeformConv"}, "TensorRT has it, and TensorRT for RTX not"


def standard_operators() -> set[str]:
    """Of the newest opset that the parser reads."""
    newest = preflight.OPSETS.stop - 1
    schemas = [schema for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""]
    return {schema.name for schema in schemas if schema.since_version <= newest and not schema.deprecated}


def test_every_operator_of_the_list_is_one_of_onnx() -> None:
    assert standard_operators() >= preflight.LACKS
    assert set(preflight.CONDITIONS) <= standard_operators() - preflight.LACKS


def test_constants_may_be_nodes_and_values_may_be_constants(tmp_path: Path) -> None:
    axis = numpy_helper.from_array(np.array(1))
    nodes = [helper.make_node("Constant", [], ["a"], value=axis), node("CumSum", "a")]
    assert preflight.preflight(file(tmp_path / "m.onnx", nodes)) == ()
    shape = [node("Shape", outputs=("a",)), node("CumSum", "b")]
    sliced = helper.make_node("ReduceMin", ["a"], ["b"], keepdims=0)
    (refusal,) = preflight.preflight(file(tmp_path / "m.onnx", [shape[0], sliced, shape[1]]))
    assert refusal.reason == "its second input must be an initialiser"


def test_weights_beside_the_model_are_not_asked_for(tmp_path: Path) -> None:
    nodes, constants = quantised(0)
    path = file(tmp_path / "m.onnx", nodes, constants)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    (tmp_path / "weights").unlink()
    assert preflight.preflight(path) == ()


def test_bodies_are_looked_at(tmp_path: Path) -> None:
    body = helper.make_graph(
        [helper.make_node("Det", ["step"], ["d"], name="inner"), helper.make_node("Add", ["state", "d"], ["next"])],
        "body",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (("state", []), ("step", [8, 8]))
        ],
        [helper.make_tensor_value_info("next", TensorProto.FLOAT, [])],
    )
    scan = helper.make_node("Scan", ["zero", "x"], ["y"], name="scan", num_scan_inputs=1, body=body)
    path = file(tmp_path / "m.onnx", [scan], {"zero": np.float32(0)}, shape=(3, 8, 8))
    assert [(each.node, each.operator) for each in preflight.preflight(path)] == [("inner", "Det")]


def test_what_is_no_model_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"m\.onnx"):
        preflight.preflight(tmp_path / "m.onnx")
