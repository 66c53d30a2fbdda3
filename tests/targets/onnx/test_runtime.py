import contextlib
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from mobilemix.errors import InputError, TargetError
from mobilemix.targets.onnx.runtime import OnnxRunner


def one_node(path: Path, operator: str, dtype: int = TensorProto.FLOAT) -> Path:
    """A file with a single node of one input and one output, unchecked."""
    x, y = (helper.make_tensor_value_info(name, dtype, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node(operator, ["x"], ["y"])], "graph", [x], [y])
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)]), path)
    return path


def test_values_come_in_order_and_end_with_the_output(backbone: Path) -> None:
    sample = {"image": np.random.default_rng(0).standard_normal((1, 3, 16, 16), np.float32)}
    runner = OnnxRunner(backbone)
    values = list(runner.values(sample))
    names = [name for name, _ in values]
    assert names == [name for node in onnx.load(backbone).graph.node for name in node.output]
    assert all(value.dtype == np.float32 for _, value in values)
    np.testing.assert_allclose(values[-1][1], runner.run(sample)["logits"], rtol=1e-4, atol=1e-5)


def test_values_are_those_of_the_module(backbone: Path) -> None:
    sample = {"image": np.random.default_rng(0).standard_normal((1, 3, 16, 16), np.float32)}
    values = dict(OnnxRunner(backbone).values(sample))
    assert values["silu"].shape == (1, 8, 8, 8)
    np.testing.assert_allclose(values["hardswish"].mean((2, 3)), values["mean_2"], rtol=1e-4, atol=1e-6)


def test_integer_values_are_left_out(tmp_path: Path) -> None:
    nodes = [helper.make_node("ArgMax", ["x"], ["index"]), helper.make_node("Cast", ["index"], ["y"], to=1)]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    index = helper.make_tensor_value_info("index", TensorProto.INT64, [1])
    graph = helper.make_graph(nodes, "graph", [x], [y], value_info=[index])
    path = tmp_path / "argmax.onnx"
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)]), path)
    runner = OnnxRunner(path)
    assert [name for name, _ in runner.values({"x": np.array([0, 2, 1], np.float32)})] == ["y"]
    assert runner.run({"x": np.array([0, 2, 1], np.float32)})["y"] == [1]


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_truncated_file_is_refused(backbone: Path, share: float) -> None:
    content = backbone.read_bytes()
    backbone.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"small\.onnx|cannot load"):
        OnnxRunner(backbone)


@settings(max_examples=30, deadline=None)
@given(position=st.integers(0, 10**6), flipped=st.integers(1, 255))
def test_damaged_file_never_escapes_as_another_error(backbone_file: Path, position: int, flipped: int) -> None:
    content = bytearray(backbone_file.read_bytes())
    content[position % len(content)] ^= flipped
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "damaged.onnx")
        path.write_bytes(content)
        with contextlib.suppress(InputError, TargetError):
            OnnxRunner(path)


@pytest.mark.parametrize("content", [b"not a model", b"\x08\x08", b"PK\x03\x04" + bytes(200), b"\x80\x04K\x01."])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.onnx"):
        OnnxRunner(path)


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.onnx"):
        OnnxRunner(tmp_path / "none.onnx")
    with pytest.raises(InputError, match="cannot read"):
        OnnxRunner(tmp_path)


def test_invalid_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot load"):
        OnnxRunner(one_node(tmp_path / "a.onnx", "Rectify"))


def test_operator_without_a_kernel_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"no kernel.*Atanh"):
        OnnxRunner(one_node(tmp_path / "a.onnx", "Atanh", TensorProto.DOUBLE))


def test_wrong_inputs_are_refused(backbone: Path) -> None:
    with pytest.raises(InputError, match="image"):
        OnnxRunner(backbone).run({"image": np.zeros((1, 3, 8, 8), np.float32)})
    with pytest.raises(InputError, match="image"):
        OnnxRunner(backbone).run({"picture": np.zeros((1, 3, 16, 16), np.float32)})
