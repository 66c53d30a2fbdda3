"""Small ONNX files for TensorRT's parser and builder, and when there is one here."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mobilemix.targets.tensorrt.builder import can_build

needs_rtx = pytest.mark.skipif(bool(can_build("tensorrt-rtx")), reason=f"{can_build('tensorrt-rtx')}")

CHANNELS, SIZE = 8, 16


def conv(path: Path, dtype: type = np.float32, batch: int | str = 1) -> Path:
    """x → Conv → Relu → y; weights, input and output of one type."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weight = numpy_helper.from_array(_noise(CHANNELS, 3, 3, 3).astype(dtype), "weight")
    nodes = [
        helper.make_node("Conv", ["x", "weight"], ["c"], name="stem/conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["y"], name="stem/relu"),
    ]
    return _save(path, nodes, [weight], kind, batch, CHANNELS)


def quantised(path: Path) -> Path:
    """x → QDQ → Conv of a dequantised weight → y."""
    weight = numpy_helper.from_array(_noise(CHANNELS, 3, 3, 3, scale=40).astype(np.int8), "weight")
    constants = [
        weight,
        numpy_helper.from_array(np.full(CHANNELS, 0.01, np.float32), "scales"),
        numpy_helper.from_array(np.zeros(CHANNELS, np.int8), "zeros"),
        numpy_helper.from_array(np.float32(0.02), "scale"),
        numpy_helper.from_array(np.int8(0), "zero"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], name="stem/q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], name="stem/d"),
        helper.make_node("DequantizeLinear", ["weight", "scales", "zeros"], ["w"], name="stem/w", axis=0),
        helper.make_node("Conv", ["d", "w"], ["y"], name="stem/conv", pads=[1, 1, 1, 1]),
    ]
    return _save(path, nodes, constants, TensorProto.FLOAT, 1, CHANNELS)


def fourier(path: Path) -> Path:
    """x → DFT over its rows → y, which TensorRT has not."""
    constants = [numpy_helper.from_array(np.array(SIZE), "length"), numpy_helper.from_array(np.array(2), "axis")]
    nodes = [
        helper.make_node("Unsqueeze", ["x", "last"], ["u"], name="mixer/unsqueeze"),
        helper.make_node("DFT", ["u", "length", "axis"], ["f"], name="mixer/fft"),
        helper.make_node("ReduceSum", ["f", "last"], ["y"], name="mixer/sum", keepdims=0),
    ]
    constants.append(numpy_helper.from_array(np.array([4]), "last"))
    return _save(path, nodes, constants, TensorProto.FLOAT, 1, 3, opset=20)


def _save(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: list[onnx.TensorProto],
    kind: int,
    batch: int | str,
    channels: int,
    opset: int = 18,
) -> Path:
    x = helper.make_tensor_value_info("x", kind, [batch, 3, SIZE, SIZE])
    y = helper.make_tensor_value_info("y", kind, [batch, channels, SIZE, SIZE])
    model = helper.make_model(
        helper.make_graph(nodes, "small", [x], [y], constants),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


def _noise(*shape: int, scale: float = 0.1) -> np.ndarray:
    return scale * np.random.default_rng(0).standard_normal(shape)
