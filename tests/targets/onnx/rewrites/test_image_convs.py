import onnx_graphs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_graphs import noise, operators

from mobilemix.targets.onnx import rewrites

SIZES = st.integers(1, 6)


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 2), channels=SIZES, outputs=SIZES, height=SIZES, width=SIZES, biased=st.booleans())
def test_flattened_image_is_convolved_as_an_image(
    batch: int, channels: int, outputs: int, height: int, width: int, biased: bool
) -> None:
    text = f"""
        (float[{batch}, {channels}, {height}, {width}] x) => (float[{batch}, {outputs}, {height}, {width}] y)
        <int64[3] flat = {{{batch}, {channels}, {height * width}}},
         int64[4] image = {{{batch}, {outputs}, {height}, {width}}}> {{
            s = Reshape(x, flat)
            m = Conv(s, w{", b" if biased else ""})
            y = Reshape(m, image)
        }}"""
    weights = {"w": noise(outputs, channels, 1)} | ({"b": noise(outputs)} if biased else {})
    found = onnx_graphs.rewrite(text, weights, rewrites.PASSES)
    assert found == [("Conv", (batch, outputs, height, width))]


def test_sequence_that_others_read_stays_for_them() -> None:
    text = """
        (float[1, 4, 3, 5] x) => (float[1, 6, 3, 5] y, float[1, 4, 15] z)
        <int64[3] flat = {1, 4, 15}, int64[4] image = {1, 6, 3, 5}> {
            s = Reshape(x, flat)
            m = Conv(s, w)
            y = Reshape(m, image)
            z = Sin(s)
        }"""
    found = onnx_graphs.rewrite(text, {"w": noise(6, 4, 1)}, rewrites.PASSES)
    assert sorted(operators(found)) == ["Conv", "Reshape", "Sin"]
    assert ("Conv", (1, 6, 3, 5)) in found


@pytest.mark.parametrize(
    ("kernel", "attributes", "length"),
    [(3, "<pads=[1,1]>", 80), (1, "<strides=[2]>", 40), (1, "<pads=[1,1]>", 82)],
    ids=["neighbours", "strided", "padded"],
)
def test_conv_that_is_not_pointwise_stays_one_of_sequences(kernel: int, attributes: str, length: int) -> None:
    text = f"""
        (float[1, 4, 8, 10] x) => (float[1, 6, {length}] y) <int64[3] flat = {{1, 4, 80}}> {{
            s = Reshape(x, flat)
            y = Conv{attributes}(s, w)
        }}"""
    found = onnx_graphs.rewrite(text, {"w": noise(6, 4, kernel)}, rewrites.PASSES)
    assert found == [("Reshape", (1, 4, 80)), ("Conv", (1, 6, length))]


def test_reshape_that_is_no_flattening_stays() -> None:
    """What is convolved here are not the channels of an image."""
    text = """
        (float[1, 4, 8, 10] x) => (float[1, 6, 160] y) <int64[3] flat = {1, 2, 160}> {
            s = Reshape(x, flat)
            y = Conv(s, w)
        }"""
    found = onnx_graphs.rewrite(text, {"w": noise(6, 2, 1)}, rewrites.PASSES)
    assert found == [("Reshape", (1, 2, 160)), ("Conv", (1, 6, 160))]


def test_norm_of_a_flattened_image_is_one_of_the_image() -> None:
    text = """
        (float[1, 4, 3, 5] x) => (float[1, 4, 3, 5] y)
        <int64[3] flat = {1, 4, 15}, int64[4] image = {1, 4, 3, 5}> {
            s = Reshape(x, flat)
            t = Transpose<perm=[0,2,1]>(s)
            n = LayerNormalization<axis=-1>(t, w, b)
            u = Transpose<perm=[0,2,1]>(n)
            y = Reshape(u, image)
        }"""
    found = onnx_graphs.rewrite(text, {"w": noise(4), "b": noise(4)}, rewrites.PASSES)
    assert found == [
        ("Transpose", (1, 3, 5, 4)),
        ("LayerNormalization", (1, 3, 5, 4)),
        ("Transpose", (1, 4, 3, 5)),
    ]
