import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from mobilemix.parity import relative_l2
from mobilemix.targets.onnx.floats import keep_floats

CHANNELS, SIDE = 8, 6
SPOILED = 0.05
"""Relative error, at least, of weights of which one channel's are a thousand times as large as the others', in 8 bits
with one scale for all; a file as it is written has none."""


def model(operator: str) -> onnx.ModelProto:
    """x → Q → DQ → a layer in float → Relu → Q → DQ → y, the largest weights for a channel that is not among y."""
    random = np.random.default_rng(0)
    shape = (1, CHANNELS, SIDE, SIDE) if operator == "Conv" else (SIDE, CHANNELS)
    weight = random.standard_normal((CHANNELS, CHANNELS, 1, 1) if operator == "Conv" else (CHANNELS, CHANNELS))
    weight[0] *= 1000
    constants = {
        "w": weight.astype(np.float32),
        "b": random.standard_normal(CHANNELS).astype(np.float32),
        "in.scale": np.float32(8 / 255),
        "in.zero": np.uint8(128),
        "out.scale": np.float32(16 / 255),
        "out.zero": np.uint8(0),
        "first": np.array([1]),
        "last": np.array([CHANNELS]),
        "axis": np.array([1]),
    }
    node = helper.make_node
    attributes = {"transB": 1} if operator == "Gemm" else {}
    nodes = [
        node("QuantizeLinear", ["x", "in.scale", "in.zero"], ["x.quantised"]),
        node("DequantizeLinear", ["x.quantised", "in.scale", "in.zero"], ["x.dequantised"]),
        node(operator, ["x.dequantised", "w", "b"], ["layer"], **attributes),
        node("Relu", ["layer"], ["relu"]),
        node("QuantizeLinear", ["relu", "out.scale", "out.zero"], ["relu.quantised"]),
        node("DequantizeLinear", ["relu.quantised", "out.scale", "out.zero"], ["relu.dequantised"]),
        node("Slice", ["relu.dequantised", "first", "last", "axis"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [value("x", TensorProto.FLOAT, shape)],
        [value("y", TensorProto.FLOAT, (shape[0], CHANNELS - 1, *shape[2:]))],
        [numpy_helper.from_array(content, name) for name, content in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return onnx.shape_inference.infer_shapes(made)


def protected(operator: str) -> onnx.ModelProto:
    changed = ir.from_proto(model(operator))
    keep_floats(changed.graph, ())
    return ir.to_proto(changed)


def answer(written: onnx.ModelProto, optimised: bool) -> np.ndarray:
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    session = ort.InferenceSession(written.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    return session.run(None, {"x": np.random.default_rng(1).standard_normal(taken.shape, np.float32)})[0]


@pytest.mark.parametrize("operator", ["Conv", "Gemm"])
def test_a_layer_in_float_stays_in_float(operator):
    expected = answer(model(operator), optimised=False)
    assert relative_l2(answer(model(operator), optimised=True), expected) > SPOILED  # or none of this is needed
    np.testing.assert_array_equal(answer(protected(operator), optimised=False), expected)
    assert relative_l2(answer(protected(operator), optimised=True), expected) < SPOILED / 100


def test_the_file_is_valid_and_its_names_tell_whose_forms_they_are():
    written = protected("Conv")
    onnx.checker.check_model(written, full_check=True)
    layer = next(node for node in written.graph.node if node.op_type == "Conv")
    assert layer.input[0] == "x@layer.dequantised"


def test_layers_in_integers_are_left_as_they_are():
    changed = ir.from_proto(model("Conv"))
    keep_floats(changed.graph, {node for node in changed.graph if node.op_type == "Conv"})
    assert ir.to_proto(changed).graph == ir.to_proto(ir.from_proto(model("Conv"))).graph
