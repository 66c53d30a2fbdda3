import numpy as np
import onnx_graphs
import pytest
from onnx_graphs import noise, operators

from mobilemix.targets.onnx import rewrites
from mobilemix.targets.onnx.rewrites import forms

INPUTS = 64
OUTPUTS = forms.HEAD_BYTES // (INPUTS * np.dtype(np.float32).itemsize)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize(
    ("rows", "outputs", "expected"),
    [(1, OUTPUTS, ["Reshape", "Conv", "Reshape"]), (1, OUTPUTS - 1, ["Gemm"]), (2, OUTPUTS, ["Gemm"])],
    ids=["one row, many weights", "fewer weights", "two rows"],
)
def test_one_row_by_many_weights_is_a_convolution(
    rows: int, outputs: int, expected: list[str], transposed: bool
) -> None:
    text = f"""
        (float[{rows}, {INPUTS}] x) => (float[{rows}, {outputs}] y) {{
            y = Gemm<transB={int(transposed)}>(x, w, b)
        }}"""
    weights = {"w": noise(outputs, INPUTS) if transposed else noise(INPUTS, outputs), "b": noise(outputs)}
    assert operators(onnx_graphs.rewrite(text, weights, rewrites.PASSES)) == expected


def test_scaled_product_stays() -> None:
    text = f"(float[1, {INPUTS}] x) => (float[1, {OUTPUTS}] y) {{ y = Gemm<transB=1, alpha=0.5>(x, w, b) }}"
    weights = {"w": noise(OUTPUTS, INPUTS), "b": noise(OUTPUTS)}
    assert operators(onnx_graphs.rewrite(text, weights, rewrites.PASSES)) == ["Gemm"]
