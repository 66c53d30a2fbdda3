import onnx_graphs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_graphs import noise, operators

from mobilemix.targets.onnx import rewrites
from mobilemix.targets.onnx.rewrites import forms


@settings(deadline=None, max_examples=30)
@given(channels=st.integers(2, 40), height=st.integers(1, 5), biased=st.booleans())
def test_channels_are_added_up_to_the_next_multiple(channels: int, height: int, biased: bool) -> None:
    bias, other = (", b", ", c") if biased else ("", "")
    text = f"""
        (float[1, 3, {height}, 4] x) => (float[1, {channels}, {height}, 4] y) {{
            m = Conv(x, w{bias})
            y = Conv<group={channels}, pads=[1,1,1,1]>(m, f{other})
        }}"""
    weights = {"w": noise(channels, 3, 1, 1), "f": noise(channels, 1, 3, 3)}
    biases = {"b": noise(channels), "c": noise(channels)} if biased else {}
    found = onnx_graphs.rewrite(text, weights | biases, rewrites.PASSES)
    more = forms.missing_channels(channels)
    convs = [("Conv", (1, channels + more, height, 4))] * 2
    assert (channels + more) % forms.CHANNEL_MULTIPLE == 0
    assert found == convs + ([("Slice", (1, channels, height, 4))] if more else [])


def test_split_leaves_the_added_channels_unread() -> None:
    text = """
        (float[1, 4, 3, 5] x) => (float[1, 3, 15] q, float[1, 3, 15] k, float[1, 3, 15] v)
        <int64[3] flat = {1, 9, 15}, int64[3] sizes = {3, 3, 3}> {
            m = Conv(x, w)
            y = Conv<group=9, pads=[1,1,1,1]>(m, f)
            s = Reshape(y, flat)
            q, k, v = Split<axis=1>(s, sizes)
        }"""
    found = onnx_graphs.rewrite(text, {"w": noise(9, 4, 1, 1), "f": noise(9, 1, 3, 3)}, rewrites.PASSES)
    assert operators(found) == ["Conv", "Conv", "Reshape", "Split"]
    assert found[2] == ("Reshape", (1, 12, 15))


def test_first_conv_that_others_read_keeps_its_channels() -> None:
    text = """
        (float[1, 4, 3, 5] x) => (float[1, 9, 3, 5] y, float[1, 9, 3, 5] z) {
            m = Conv(x, w)
            y = Conv<group=9, pads=[1,1,1,1]>(m, f)
            z = Sin(m)
        }"""
    found = onnx_graphs.rewrite(text, {"w": noise(9, 4, 1, 1), "f": noise(9, 1, 3, 3)}, rewrites.PASSES)
    assert sorted(operators(found)) == ["Conv", "Conv", "Sin"]


@pytest.mark.parametrize(
    ("first", "second", "groups"),
    [((9, 4, 1, 1), (9, 3, 3, 3), 3), ((9, 4, 1, 1), (18, 1, 3, 3), 9)],
    ids=["groups of several", "several of a channel"],
)
def test_other_groups_stay(first: tuple[int, ...], second: tuple[int, ...], groups: int) -> None:
    text = f"""
        (float[1, 4, 3, 5] x) => (float[1, {second[0]}, 3, 5] y) {{
            m = Conv(x, w)
            y = Conv<group={groups}, pads=[1,1,1,1]>(m, f)
        }}"""
    found = onnx_graphs.rewrite(text, {"w": noise(*first), "f": noise(*second)}, rewrites.PASSES)
    assert found == [("Conv", (1, 9, 3, 5)), ("Conv", (1, second[0], 3, 5))]
