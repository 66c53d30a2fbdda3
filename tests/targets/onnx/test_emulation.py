from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mobilemix.targets.onnx.runtime import OnnxRunner, trace

BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
X = np.random.default_rng(0).standard_normal(64, np.float32)
WEIGHT = np.random.default_rng(1).standard_normal(64, np.float32).astype(BFLOAT16)


def rounded(value: np.ndarray) -> np.ndarray:
    return value.astype(BFLOAT16).astype(np.float32)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """((x · w) transposed) + itself in bfloat16, and back."""
    weight = numpy_helper.from_array(WEIGHT, "w")
    nodes = [
        helper.make_node("Cast", ["x"], ["x.half"], to=TensorProto.BFLOAT16),
        helper.make_node("Mul", ["x.half", "w"], ["product"]),
        helper.make_node("Transpose", ["product"], ["moved"]),
        helper.make_node("Add", ["moved", "product"], ["sum"]),
        helper.make_node("Cast", ["sum"], ["y"], to=TensorProto.FLOAT),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64]) for name in ("x", "y")]
    inner = [
        helper.make_tensor_value_info(name, TensorProto.BFLOAT16, [64])
        for name in ("x.half", "product", "moved", "sum")
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight], value_info=inner)
    path = tmp_path_factory.mktemp("emulated") / "product.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10), path)
    return path


@pytest.mark.parametrize("optimised", [True, False])
def test_results_are_rounded_after_every_operator(product: Path, optimised: bool) -> None:
    first = rounded(rounded(X) * WEIGHT.astype(np.float32))
    expected = rounded(first + first)
    assert np.array_equal(OnnxRunner(product, optimised).run({"x": X})["y"], expected)
    assert not np.array_equal(rounded(2 * X * WEIGHT.astype(np.float32)), expected)  # one rounding at the end is less


def test_values_have_the_names_of_the_file(product: Path) -> None:
    _, values = trace(product, {"x": X})
    assert list(values) == ["x.half", "product", "moved", "sum", "y"]
    assert np.array_equal(values["x.half"], rounded(X))


def test_weights_beside_the_file_are_found(product: Path, tmp_path: Path) -> None:
    model = onnx.load(product)
    onnx.save(model, tmp_path / "apart.onnx", save_as_external_data=True, location="weights.data", size_threshold=0)
    assert (tmp_path / "weights.data").exists()
    assert np.array_equal(
        OnnxRunner(tmp_path / "apart.onnx").run({"x": X})["y"], OnnxRunner(product).run({"x": X})["y"]
    )
