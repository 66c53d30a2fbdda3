import onnx_graphs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_graphs import noise, operators

from mobilemix.targets.onnx import rewrites
from mobilemix.targets.onnx.rewrites import forms

SIZES = st.integers(2, 6)
FEW, MANY = forms.POSITIONS_AS_ROWS, forms.POSITIONS_AS_ROWS + 1


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(1, 2), channels=SIZES, states=SIZES, positions=SIZES, biased=st.booleans())
def test_gated_states_between_products_are_computed_without_transposing(
    batch: int, channels: int, states: int, positions: int, biased: bool
) -> None:
    """As in EfficientViM: read into states, two pointwise convolutions with a gate between, read back."""
    text = f"""
        (float[{batch}, {states}, {positions}] r, float[{batch}, {positions}, {channels}] x,
         float[{batch}, {states}, {positions}] q) => (float[{batch}, {channels}, {positions}] y)
        <int64[2] halves = {{{channels}, {channels}}}, float[1] d = {{0.5}}> {{
            xt = Transpose<perm=[0,2,1]>(x)
            rt = Transpose<perm=[0,2,1]>(r)
            s = MatMul(xt, rt)
            hz = Conv(s, w{", b" if biased else ""})
            h, z = Split<axis=1>(hz, halves)
            g = Sigmoid(z)
            silu = Mul(z, g)
            shifted = Add(silu, d)
            gated = Mul(h, shifted)
            o = Conv(gated, v)
            y = MatMul(o, q)
        }}"""
    weights = {"w": noise(2 * channels, channels, 1), "v": noise(channels, channels, 1)}
    found = operators(
        onnx_graphs.rewrite(text, weights | ({"b": noise(2 * channels)} if biased else {}), rewrites.PASSES)
    )
    # The one that is left is an operand of the last product, where runtimes multiply by the transposed matrix.
    assert found.count("Transpose") == 1
    assert found.count("MatMul") == 4
    assert "Conv" not in found


@pytest.mark.parametrize(("positions", "operator"), [(FEW, "MatMul"), (MANY, "Conv")])
def test_short_sequences_alone_are_multiplied(positions: int, operator: str) -> None:
    text = f"(float[1, 3, {positions}] x) => (float[1, 5, {positions}] y) {{ y = Conv(x, w) }}"
    assert operator in operators(onnx_graphs.rewrite(text, {"w": noise(5, 3, 1)}, rewrites.PASSES))


@pytest.mark.parametrize(
    ("kernel", "attributes", "length"),
    [((6, 2, 1), "<group=2>", 8), ((6, 4, 3), "", 6), ((6, 4, 1), "<strides=[2]>", 4)],
)
def test_other_convs_stay(kernel: tuple[int, int, int], attributes: str, length: int) -> None:
    text = f"(float[1, 4, 8] x) => (float[1, 6, {length}] y) {{ y = Conv{attributes}(x, w) }}"
    assert operators(onnx_graphs.rewrite(text, {"w": noise(*kernel)}, rewrites.PASSES)) == ["Conv"]


def test_computed_weights_stay_a_conv() -> None:
    text = "(float[1, 4, 8] x, float[6, 4, 1] w) => (float[1, 6, 8] y) { y = Conv(x, w) }"
    assert operators(onnx_graphs.rewrite(text, {}, rewrites.PASSES)) == ["Conv"]


def test_product_that_others_read_is_computed_once() -> None:
    text = """
        (float[1, 3, 4] a, float[1, 4, 5] b) => (float[1, 5, 3] y, float[1, 3, 5] z) {
            p = MatMul(a, b)
            y = Transpose<perm=[0,2,1]>(p)
            z = Sin(p)
        }"""
    assert operators(onnx_graphs.rewrite(text, {}, rewrites.PASSES)).count("MatMul") == 1


def test_pixels_are_read_as_tokens_where_they_are() -> None:
    text = """
        (float[1, 3, 5, 4] x, float[1, 4, 4] m) => (float[1, 15, 4] y) <int64[3] flat = {1, 4, 15}> {
            i = Transpose<perm=[0,3,1,2]>(x)
            s = Reshape(i, flat)
            t = Transpose<perm=[0,2,1]>(s)
            y = MatMul(t, m)
        }"""
    assert operators(onnx_graphs.rewrite(text, {}, rewrites.PASSES)) == ["Reshape", "MatMul"]
