import onnx_graphs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_graphs import noise

from mobilemix.targets.onnx import rewrites
from mobilemix.targets.onnx.rewrites import forms

SIZES = st.integers(2, 6)
LARGE = 1 + forms.MATRIX_MOVED_WHOLE // 32


def columns(count: int, rows: int, width: int, made: int) -> str:
    """A transform along the columns of a batch of matrices, as exporters write it."""
    return f"""
        (float[{count}, {rows}, {width}] x) => (float[{count}, {made}, {width}] y)
        <int64[2] flat = {{{count * width}, {rows}}}, int64[3] back = {{{count}, {width}, {made}}}> {{
            t = Transpose<perm=[0,2,1]>(x)
            r = Reshape(t, flat)
            m = MatMul(r, w)
            u = Reshape(m, back)
            y = Transpose<perm=[0,2,1]>(u)
        }}"""


@settings(deadline=None, max_examples=30)
@given(count=SIZES, rows=SIZES, width=SIZES, made=SIZES)
def test_many_matrices_are_transposed_as_one(count: int, rows: int, width: int, made: int) -> None:
    weights = {"w": noise(rows, made)}
    assert onnx_graphs.rewrite(columns(count, rows, width, made), weights, rewrites.PASSES) == [
        ("Transpose", (width, count, rows)),
        ("MatMul", (width, count, made)),
        ("Transpose", (count, made, width)),
    ]


@pytest.mark.parametrize(("count", "rows", "made"), [(1, 32, 32), (3, LARGE, 4), (3, 4, LARGE)])
def test_one_matrix_and_large_ones_are_transposed_each(count: int, rows: int, made: int) -> None:
    found = onnx_graphs.rewrite(columns(count, rows, 32, made), {"w": noise(rows, made)}, rewrites.PASSES)
    assert [shape for _, shape in found] == [(count, 32, rows), (count, 32, made), (count, made, 32)]


def test_rows_of_an_image_are_multiplied_as_they_are() -> None:
    text = """
        (float[2, 3, 4, 5] x) => (float[2, 3, 4, 6] y) <int64[2] flat = {24, 5}, int64[4] back = {2, 3, 4, 6}> {
            r = Reshape(x, flat)
            m = MatMul(r, w)
            y = Reshape(m, back)
        }"""
    assert onnx_graphs.rewrite(text, {"w": noise(5, 6)}, rewrites.PASSES) == [("MatMul", (2, 3, 4, 6))]


@pytest.mark.parametrize("shape", [(24, 5), (2, 60)])
def test_a_reshape_of_rows_stays(shape: tuple[int, int]) -> None:
    """One after which other elements are multiplied."""
    rows, size = shape
    text = f"""
        (float[2, 5, 3, 4] x) => (float[{rows}, 6] y) <int64[2] flat = {{{rows}, {size}}}> {{
            r = Reshape(x, flat)
            y = MatMul(r, w)
        }}"""
    found = onnx_graphs.rewrite(text, {"w": noise(size, 6)}, rewrites.PASSES)
    assert onnx_graphs.operators(found) == ["Reshape", "MatMul"]


def test_products_with_what_is_computed_stay() -> None:
    text = """
        (float[3, 4, 5] x, float[4, 6] w) => (float[3, 6, 5] y) {
            t = Transpose<perm=[0,2,1]>(x)
            m = MatMul(t, w)
            y = Transpose<perm=[0,2,1]>(m)
        }"""
    found = onnx_graphs.rewrite(text, {}, rewrites.PASSES)
    assert [shape for _, shape in found] == [(3, 5, 4), (3, 5, 6), (3, 6, 5)]
