"""The saturation trap: what VPMADDUBSW and VPMADDWD make of each format, by Intel's definition of the two."""

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mobilemix.quantization.affine import to_integers
from mobilemix.quantization.options import FORMATS as NAMES
from mobilemix.targets.base import Array
from mobilemix.targets.onnx.formats import FORMATS

CPU_FLAGS = Path("/proc/cpuinfo")
SATURATING = ("u8s8",)
"""Formats of which VPMADDUBSW clips sums of pairs."""
DEPTH, WIDTH = 64, 8


def pairs(numbers: Array) -> Array:
    """(…, K) as (…, K / 2, 2)."""
    return numbers.reshape(*numbers.shape[:-1], -1, 2)


def vpmaddubsw(unsigned: Array, signed: Array) -> Array:
    """Products of u8 and s8, added in pairs, clipped to 16 bits."""
    sums = (pairs(unsigned).astype(np.int32) * pairs(signed).astype(np.int32)).sum(-1)
    return np.clip(sums, -(1 << 15), (1 << 15) - 1)


def vpmaddwd(left: Array, right: Array) -> Array:
    """Products of s16 and s16, added in pairs, in 32 bits."""
    return (pairs(left).astype(np.int64) * pairs(right).astype(np.int64)).sum(-1)


def dot_without_vnni(name: str, activations: Array, weights: Array) -> Array:
    """(K,) and (N, K) multiplied as on x86 with AVX2 and no VNNI: zero points are taken off afterwards.

    u8u8 is widened to 16 bits first; signed activations are made unsigned by 128, for the same instruction.
    """
    if name == "u8u8":
        return vpmaddwd(activations[None], weights).sum(-1)
    offset = 128 if name == "s8s8" else 0
    unsigned = (activations.astype(np.int32) + offset).astype(np.uint8)
    sums = vpmaddubsw(np.broadcast_to(unsigned, weights.shape), weights)
    return vpmaddwd(sums, np.ones_like(sums)).sum(-1) - offset * weights.astype(np.int64).sum(-1)


def planted() -> tuple[Array, Array]:
    """Activations near the end of their range, and weights near the end of theirs, of one sign: (K,) and (N, K)."""
    generator = np.random.default_rng(0)
    return generator.uniform(0.9, 1, DEPTH), generator.uniform(0.9, 1, (WIDTH, DEPTH))


def integers(name: str, activations: Array, weights: Array) -> tuple[Array, Array]:
    form = FORMATS[name]
    first, second = form.activation(0.0, 1.0), form.weight(np.abs(weights).max(1), 0)
    return to_integers(activations, first), to_integers(weights, second)


@pytest.mark.parametrize("name", NAMES)
def test_which_formats_saturate_without_vnni(name: str) -> None:
    activations, weights = integers(name, *planted())
    exact = weights.astype(np.int64) @ activations.astype(np.int64)
    found = dot_without_vnni(name, activations, weights)
    if name == "u8s8":
        assert np.all(found < 0.6 * exact)  # half of each pair is gone
    elif name == "s8s8":
        assert not np.array_equal(found, exact)  # 128 more makes large numbers of them
    else:
        assert np.array_equal(found, exact)


@given(st.data(), st.sampled_from(("u8u8", "u8s7")))
def test_the_formats_for_cpus_without_vnni_are_exact_for_any_numbers(data: st.DataObject, name: str) -> None:
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    form = FORMATS[name]
    grid = form.weight(np.ones(WIDTH), 0)
    activations = generator.choice([0, 1, 254, 255], DEPTH).astype(np.uint8)
    weights = generator.choice([grid.low, grid.low + 1, grid.high], (WIDTH, DEPTH)).astype(grid.dtype)
    exact = weights.astype(np.int64) @ activations.astype(np.int64)
    assert np.array_equal(dot_without_vnni(name, activations, weights), exact)


def runtime(name: str) -> tuple[Array, Array]:
    """The planted layer's sums by ONNX Runtime, and exactly."""
    activations, weights = integers(name, *planted())
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "planted",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(activations.dtype), (1, DEPTH))],
        [helper.make_tensor_value_info("y", TensorProto.INT32, (1, WIDTH))],
        [numpy_helper.from_array(np.ascontiguousarray(weights.T), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": activations[None]})
    return found[0], weights.astype(np.int64) @ activations.astype(np.int64)


def flags() -> set[str]:
    lines = CPU_FLAGS.read_text().splitlines() if CPU_FLAGS.exists() else []
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


needs_x86 = pytest.mark.skipif("avx2" not in flags(), reason="the instructions are those of x86 with AVX2")
HAS_VNNI = bool({"avx512_vnni", "avx_vnni", "amx_int8"} & flags())


@needs_x86
@pytest.mark.skipif(HAS_VNNI, reason="this CPU has VNNI, whose sums are of 32 bits: nothing saturates")
@pytest.mark.parametrize("name", ["u8s8", "u8u8", "u8s7"])
def test_the_runtime_saturates_where_the_emulation_does(name: str) -> None:
    found, exact = runtime(name)
    assert np.array_equal(found, exact) == (name not in SATURATING)


@needs_x86
@pytest.mark.skipif(not HAS_VNNI, reason="this CPU has no VNNI: u8s8 saturates")
@pytest.mark.parametrize("name", NAMES)
def test_nothing_saturates_with_vnni(name: str) -> None:
    found, exact = runtime(name)
    assert np.array_equal(found, exact)
