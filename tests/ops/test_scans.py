"""The three scans against loops written once more in NumPy, element by element, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch

from mobilemix import ops
from mobilemix.errors import InputError

EXACT = 1e-12
"""Relative error of float64 arithmetic in another order."""

TOLERANCE = {torch.float64: EXACT, torch.float32: 1e-5, torch.float16: 2e-3}


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def silu(x):
    return x / (1 + np.exp(-x))


def naive_selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    (batch, channels, length), size = u.shape, A.shape[1]
    y, h = np.zeros(u.shape), np.zeros((batch, channels, size))

    def entry(matrix, i, d, n, t):
        if matrix.ndim == 2:
            return matrix[d, n]
        return matrix[i, n, t] if matrix.ndim == 3 else matrix[i, d * matrix.shape[1] // channels, n, t]

    for i, d, t in itertools.product(range(batch), range(channels), range(length)):
        step = delta[i, d, t] + (0 if delta_bias is None else delta_bias[d])
        step = softplus(step) if delta_softplus else step
        for n in range(size):
            h[i, d, n] = math.exp(step * A[d, n]) * h[i, d, n] + step * entry(B, i, d, n, t) * u[i, d, t]
            y[i, d, t] += entry(C, i, d, n, t) * h[i, d, n]
        y[i, d, t] += 0 if D is None else D[d] * u[i, d, t]
        y[i, d, t] *= 1 if z is None else silu(z[i, d, t])
    return y, h


def naive_ssd(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, dt_softplus=False, limit=(0, np.inf)):
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    y = np.zeros(x.shape)
    state = np.zeros((batch, heads, width, size)) if initial_states is None else initial_states.copy()
    for i, k, t in itertools.product(range(batch), range(heads), range(length)):
        step = dt[i, t, k] + (0 if dt_bias is None else dt_bias[k])
        step = min(max(softplus(step) if dt_softplus else step, limit[0]), limit[1])
        group = k * groups // heads
        for p in range(width):
            for n in range(size):
                state[i, k, p, n] *= math.exp(step * A[k])
                state[i, k, p, n] += step * x[i, t, k, p] * B[i, t, group, n]
                y[i, t, k, p] += state[i, k, p, n] * C[i, t, group, n]
            if D is not None:
                y[i, t, k, p] += x[i, t, k, p] * (D[k] if D.ndim == 1 else D[k, p])
            y[i, t, k, p] *= 1 if z is None else silu(z[i, t, k, p])
    return y, state


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + math.prod(shape)))


def numpy_of(values):
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def distance(value, expected):
    return float(np.linalg.norm(value.double().numpy() - expected) / np.linalg.norm(expected))


B_SHAPES = {"constant": (6, 3), "shared": (2, 3, 7), "one group": (2, 1, 3, 7), "groups": (2, 3, 3, 7)}


def selective_arguments(b="shared", c="shared", options=True):
    given = {"u": draw(2, 6, 7), "delta": draw(2, 6, 7, seed=1).abs(), "A": -draw(6, 3).abs()}
    given |= {"B": draw(*B_SHAPES[b], seed=2), "C": draw(*B_SHAPES[c], seed=3)}
    if options:
        given |= {"D": draw(6), "z": draw(2, 6, 7, seed=4), "delta_bias": draw(6, seed=5), "delta_softplus": True}
    return given


def ssd_arguments(groups=2, options=True, wide_skip=False):
    given = {"x": draw(2, 5, 4, 3), "dt": draw(2, 5, 4).abs(), "A": -draw(4).abs()}
    given |= {"B": draw(2, 5, groups, 2), "C": draw(2, 5, groups, 2, seed=1)}
    if options:
        given |= {"D": draw(4, 3) if wide_skip else draw(4), "z": draw(2, 5, 4, 3, seed=2), "dt_bias": draw(4, seed=3)}
        given |= {"initial_states": draw(2, 4, 3, 2), "dt_softplus": True}
    return given


@pytest.mark.parametrize("b", B_SHAPES)
@pytest.mark.parametrize("c", B_SHAPES)
@pytest.mark.parametrize("options", [False, True])
def test_selective_scan_is_the_naive_loop(b, c, options):
    given = selective_arguments(b, c, options)
    expected = naive_selective_scan(**numpy_of(given))
    found = ops.selective_scan(**given, return_last_state=True)
    assert max(map(distance, found, expected)) <= EXACT


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("options", "wide_skip"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("limit", [(0.0, math.inf), (0.3, 0.9)])
def test_ssd_is_the_naive_loop(groups, options, wide_skip, limit):
    given = ssd_arguments(groups, options, wide_skip)
    expected = naive_ssd(**numpy_of(given), limit=limit)
    found = ops.ssd_chunk_scan(**given, chunk_size=4, dt_limit=limit, return_final_states=True)
    assert max(map(distance, found, expected)) <= EXACT


@pytest.mark.parametrize("initial", [None, (3, 2), (2,)])
@pytest.mark.parametrize("shape", [(5, 3, 2), (5, 1, 2)])
def test_linear_scan_is_the_naive_loop(initial, shape):
    a, b, start = draw(*shape), draw(5, 3, 2, seed=1), None if initial is None else draw(*initial)
    expected, h = np.zeros((5, 3, 2)), np.zeros((3, 2)) if start is None else start.numpy()
    for t in range(5):
        h = a[t].numpy() * h + b[t].numpy()
        expected[t] = h
    assert distance(ops.linear_scan(a, b, start), expected) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_dtypes_are_the_inputs_and_arithmetic_at_least_float32(dtype):
    narrow = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in selective_arguments().items()}
    y, state = ops.selective_scan(**narrow, return_last_state=True)
    assert (y.dtype, state.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    assert distance(y, naive_selective_scan(**numpy_of(selective_arguments()))[0]) <= TOLERANCE[dtype]
    narrow = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in ssd_arguments().items()}
    y, state = ops.ssd_chunk_scan(**narrow, chunk_size=4, return_final_states=True)
    assert (y.dtype, state.dtype) == (dtype, torch.promote_types(dtype, torch.float32))
    assert distance(y, naive_ssd(**numpy_of(ssd_arguments()))[0]) <= TOLERANCE[dtype]
    assert ops.linear_scan(draw(3, 2).to(dtype), draw(3, 2).to(dtype)).dtype == dtype


def test_only_the_output_is_returned_by_default():
    assert ops.selective_scan(**selective_arguments()).shape == (2, 6, 7)
    assert ops.ssd_chunk_scan(**ssd_arguments(), chunk_size=4).shape == (2, 5, 4, 3)


OPERATORS = {
    "selective_scan": (torch.ops.mobilemix.selective_scan.default, tuple(selective_arguments("groups").values())),
    "selective_scan, plain": (
        torch.ops.mobilemix.selective_scan.default,
        tuple(selective_arguments("constant", options=False).values()),
    ),
    "ssd_chunk_scan": (
        torch.ops.mobilemix.ssd_chunk_scan.default,
        (*list(ssd_arguments().values())[:5], 4, *list(ssd_arguments().values())[5:], 0.1, 2.0),
    ),
    "linear_scan": (torch.ops.mobilemix.linear_scan.default, (draw(4, 3, 1), draw(4, 1, 2), draw(3, 2))),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients(name):
    operator, given = OPERATORS[name]
    leaves = [item.detach().clone().requires_grad_() if isinstance(item, torch.Tensor) else item for item in given]
    assert torch.autograd.gradcheck(operator, leaves)


@pytest.mark.parametrize("name", OPERATORS)
def test_registration_is_sound(name):
    operator, given = OPERATORS[name]
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor", "test_autograd_registration"))


REFUSALS = {
    "A is complex": (lambda v: {"A": v["A"] + 0j}, "takes real floating-point tensors, A is complex"),
    "u is an integer": (lambda v: {"u": v["u"].int()}, "u is int32"),
    "delta is short": (lambda v: {"delta": v["delta"][..., :3]}, r"delta of shape \(2, 6, 7\), not \(2, 6, 3\)"),
    "B has a wrong state size": (lambda v: {"B": v["B"][:, :2]}, r"B of shape \(6, 3\) or \(2, 3, 7\) or"),
    "groups do not divide": (lambda v: {"C": draw(2, 4, 3, 7)}, "which 4 groups of C do not divide"),
    "u has two axes": (lambda v: {"u": v["u"][0]}, r"takes u \(b, d, l\)"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_selective_scan_refuses_in_one_line(name):
    change, message = REFUSALS[name]
    given = selective_arguments()
    with pytest.raises(InputError, match=message) as caught:
        ops.selective_scan(**{**given, **change(given)})
    assert "\n" not in str(caught.value)


def test_others_refuse_too():
    given = ssd_arguments()
    with pytest.raises(InputError, match="A is complex"):
        ops.ssd_chunk_scan(**{**given, "A": given["A"] + 0j}, chunk_size=4)
    with pytest.raises(InputError, match="3 groups of B and C do not divide"):
        ops.ssd_chunk_scan(**{**given, "B": draw(2, 5, 3, 2), "C": draw(2, 5, 3, 2)}, chunk_size=4)
    with pytest.raises(InputError, match="a is complex"):
        ops.linear_scan(draw(3, 2) + 0j, draw(3, 2))
    with pytest.raises(InputError, match="one shape"):
        ops.linear_scan(draw(3, 2), draw(1, 2))
    with pytest.raises(InputError, match=r"initial of shape \(2,\)"):
        ops.linear_scan(draw(3, 2), draw(3, 2), draw(3))


class Scans(torch.nn.Module):
    def forward(self, u, delta, matrix):
        y = ops.selective_scan(u, delta, -torch.ones(6, 3), matrix, matrix)
        return y + ops.linear_scan(u.permute(2, 0, 1), delta.permute(2, 0, 1)).permute(1, 2, 0)


def test_capture_keeps_them_whole():
    from mobilemix.capture import capture

    program = capture(Scans(), (torch.zeros(2, 6, 7), torch.zeros(2, 6, 7), torch.zeros(2, 3, 7)))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("mobilemix.selective_scan.default") == targets.count("mobilemix.linear_scan.default") == 1


def test_a_refusal_passes_through_capture():
    from mobilemix.capture import capture

    with pytest.raises(InputError, match="delta of shape"):
        capture(Scans(), (torch.zeros(2, 6, 7), torch.zeros(2, 6, 8), torch.zeros(2, 3, 7)))
