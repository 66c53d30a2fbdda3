from pathlib import Path

import numpy as np
import onnx
import pytest
from tensorrt_graphs import conv, needs_rtx

from mobilemix.errors import InputError, TargetError
from mobilemix.targets.tensorrt import bindings, rtx
from mobilemix.targets.tensorrt.builder import BuildOptions, build

pytestmark = needs_rtx


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine with the ONNX file that it was built from beside it."""
    model = conv(tmp_path / "small.rtx.onnx", np.float16)
    return build(model, tmp_path / "small.rtx.engine", tmp_path / "log", "tensorrt-rtx", BuildOptions()).engine


def test_an_engine_becomes_a_model_of_one_node(engine: Path) -> None:
    model = onnx.load_from_string(rtx.wrap(engine, engine.with_suffix(".onnx")))
    (node,) = model.graph.node
    attributes = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
    assert (node.op_type, node.domain) == ("EPContext", "com.microsoft")
    assert (node.input, node.output) == (["x"], ["y"])
    assert attributes["ep_cache_context"] == engine.read_bytes()
    assert attributes["embed_mode"] == 1
    assert attributes["source"].decode() == rtx.PROVIDER
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 16, 16]
    onnx.checker.check_model(model)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"n" * 4096])
def test_what_is_not_an_engine_is_refused_without_a_gpu(content: bytes, engine: Path) -> None:
    engine.write_bytes(content)
    with pytest.raises(InputError, match=r"small\.rtx\.engine is not an engine of TensorRT for RTX"):
        rtx.RtxRunner(engine)


def test_missing_files_are_refused(engine: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        rtx.RtxRunner(engine.with_name("none.rtx.engine"))
    engine.with_suffix(".onnx").rename(engine.with_name("other.rtx.onnx"))
    with pytest.raises(InputError, match="cannot read .*small"):
        rtx.RtxRunner(engine)


def test_without_a_gpu_nothing_is_executed(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "missing_gpu", lambda: "no NVIDIA driver")
    rtx.find_device.cache_clear()
    with pytest.raises(TargetError, match="cannot be executed here: no NVIDIA driver"):
        rtx.RtxRunner(engine)


def test_a_provider_that_does_not_load_says_why(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not bindings.missing_gpu():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(bindings, "missing_gpu", lambda: None)
    rtx.find_device.cache_clear()
    with pytest.raises(TargetError, match="ONNX Runtime cannot load NvTensorRTRTXExecutionProvider: .*libcuda"):
        rtx.RtxRunner(engine)
