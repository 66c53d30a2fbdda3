"""Every function that a stand-in offers, against loops in NumPy and float64 that follow the papers."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mobilemix.errors import UnsupportedOpError
from mobilemix.shims import shim

EXACT = {"rtol": 1e-10, "atol": 1e-10}
FLOAT32 = {"rtol": 2e-5, "atol": 2e-5}

B, D, L, N, G = 2, 6, 7, 3, 2


@pytest.fixture(autouse=True)
def _inside():
    with shim("mamba"):
        yield


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def softplus(x):
    return np.log1p(np.exp(x))


def silu(x):
    return x / (1 + np.exp(-x))


def scan(u, delta, A, B_, C, D_=None, z=None, delta_bias=None, delta_softplus=False):
    """Algorithm 2 of the Mamba paper, one channel and one step after the other; B and C are (b, g, n, l)."""
    values = (u, delta, A, B_, C, D_, z, delta_bias)
    u, delta, A, B_, C, D_, z, delta_bias = (None if value is None else np.asarray(value) for value in values)
    (batch, channels, length), groups = u.shape, B_.shape[1]
    y, last = np.zeros(u.shape), np.zeros((batch, channels, A.shape[1]))
    for b, d in itertools.product(range(batch), range(channels)):
        h, group = np.zeros(A.shape[1]), d // (channels // groups)
        for t in range(length):
            step = delta[b, d, t] + (0 if delta_bias is None else delta_bias[d])
            step = softplus(step) if delta_softplus else step
            h = np.exp(step * A[d]) * h + step * B_[b, group, :, t] * u[b, d, t]
            y[b, d, t] = h @ C[b, group, :, t] + (0 if D_ is None else D_[d] * u[b, d, t])
            y[b, d, t] *= 1 if z is None else silu(z[b, d, t])
        last[b, d] = h
    return torch.from_numpy(y), torch.from_numpy(last)


def ssd(x, dt, A, B_, C, D_=None, z=None, dt_bias=None, initial=None, dt_softplus=False, dt_limit=(0, np.inf)):
    """The recurrence of the Mamba-2 paper, one head and one step after the other."""
    values = (x, dt, A, B_, C, D_, z, dt_bias, initial)
    x, dt, A, B_, C, D_, z, dt_bias, initial = (None if value is None else np.asarray(value) for value in values)
    (batch, length, heads, width), (groups, size) = x.shape, B_.shape[2:]
    y, last = np.zeros(x.shape), np.zeros((batch, heads, width, size))
    for b, h in itertools.product(range(batch), range(heads)):
        state, group = np.zeros((width, size)) if initial is None else initial[b, h], h // (heads // groups)
        for t in range(length):
            step = dt[b, t, h] + (0 if dt_bias is None else dt_bias[h])
            step = np.clip(softplus(step) if dt_softplus else step, *dt_limit)
            state = np.exp(step * A[h]) * state + step * np.outer(x[b, t, h], B_[b, t, group])
            y[b, t, h] = state @ C[b, t, group] + (0 if D_ is None else D_[h] * x[b, t, h])
            y[b, t, h] *= 1 if z is None else silu(z[b, t, h])
        last[b, h] = state
    return torch.from_numpy(y), torch.from_numpy(last)


def convolve(x, weight, bias=None):
    """Causal and depthwise; x (b, d, l), weight (d, width)."""
    x, weight = np.asarray(x), np.asarray(weight)
    y = np.zeros(x.shape)
    for t, k in itertools.product(range(x.shape[2]), range(weight.shape[1])):
        past = t - (weight.shape[1] - 1) + k
        if past >= 0:
            y[:, :, t] += weight[:, k] * x[:, :, past]
    return torch.from_numpy(y if bias is None else y + np.asarray(bias)[:, None])


@pytest.fixture
def operands(random):
    """u, delta, A, B, C, D, z, delta_bias with grouped B and C."""
    return [
        random(B, D, L),
        random(B, D, L),
        -random(D, N).exp(),
        random(B, G, N, L),
        random(B, G, N, L),
        random(D),
        random(B, D, L),
        random(D),
    ]


def test_selective_scan_fn(operands):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

    u, delta, A, B_, C, D_, z, bias = operands
    expected, last = scan(*operands, delta_softplus=True)
    for function in (selective_scan_fn, selective_scan_ref):
        y, state = function(u, delta, A, B_, C, D_, z=z, delta_bias=bias, delta_softplus=True, return_last_state=True)
        torch.testing.assert_close(y, expected, **EXACT)
        torch.testing.assert_close(state, last, **EXACT)


def test_the_extension_of_mamba_ssm(operands):
    import selective_scan_cuda

    u, delta, A, B_, C, D_, _, bias = operands
    y, x, gated = selective_scan_cuda.fwd(*operands, True)
    expected, last = scan(u, delta, A, B_, C, D_, None, bias, True)
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(gated, scan(*operands, True)[0], **EXACT)
    torch.testing.assert_close(x[:, :, -1, 1::2], last, **EXACT)
    assert len(selective_scan_cuda.fwd(u, delta, A, B_, C, D_, None, bias, True)) == 2


@pytest.mark.parametrize("extension", ["core", "nrow", "ndstate", "oflex"])
def test_the_extensions_of_vmamba(operands, extension):
    import importlib

    u, delta, A, B_, C, D_, _, bias = operands
    options = (1, True) if extension == "oflex" else (1,)
    fwd = importlib.import_module(f"selective_scan_cuda_{extension}").fwd
    y, x, *rest = fwd(u, delta, A, B_, C, D_, bias, True, *options)
    expected, last = scan(u, delta, A, B_, C, D_, None, bias, True)
    torch.testing.assert_close(y, expected, **EXACT)
    torch.testing.assert_close(x[:, :, -1, 1::2], last, **EXACT)
    assert rest == []


def test_what_oflex_says_about_its_dtype(operands):
    import selective_scan_cuda_oflex

    u, delta, A, B_, C, D_, _, bias = (value.half() if value.dim() > 2 else value.float() for value in operands)
    for out_float, dtype in ((True, torch.float32), (False, torch.float16)):
        assert selective_scan_cuda_oflex.fwd(u, delta, A, B_, C, D_, bias, True, 1, out_float)[0].dtype == dtype


def test_the_scans_of_vmambas_packages(operands):
    from csms6s import selective_scan_fn
    from selective_scan import selective_scan_fn as older
    from selective_scan_vmamba_pt202 import selective_scan_cuda_core

    u, delta, A, B_, C, D_, _, bias = operands
    expected = scan(u, delta, A, B_, C, D_, None, bias, True)[0]
    torch.testing.assert_close(selective_scan_fn(u, delta, A, B_, C, D_, bias), expected, **EXACT)
    torch.testing.assert_close(older(u, delta, A, B_, C, D_, bias, True), expected, **EXACT)
    torch.testing.assert_close(selective_scan_cuda_core.fwd(u, delta, A, B_, C, D_, bias, True, 1)[0], expected)


RANK, WIDTH, MODEL = 2, 4, 5


@pytest.fixture
def layer(random):
    """The arguments of mamba_inner_fn up to A."""
    return {
        "xz": random(B, 2 * D, L),
        "conv1d_weight": random(D, 1, WIDTH),
        "conv1d_bias": random(D),
        "x_proj_weight": random(RANK + 2 * N, D),
        "delta_proj_weight": random(D, RANK),
        "out_proj_weight": random(MODEL, D),
        "out_proj_bias": random(MODEL),
        "A": -random(D, N).exp(),
        "D": random(D),
        "delta_bias": random(D),
    }


def inner(layer, xz=None, A=None, B_bias=0, C_bias=0):
    """A Mamba layer between its projections, (b, d, l)."""
    x, z = (layer["xz"] if xz is None else xz).chunk(2, 1)
    x = torch.from_numpy(silu(convolve(x, layer["conv1d_weight"][:, 0], layer["conv1d_bias"]).numpy()))
    projected = torch.einsum("bdl,rd->brl", x, layer["x_proj_weight"])
    delta = torch.einsum("brl,dr->bdl", projected[:, :RANK], layer["delta_proj_weight"])
    B_ = projected[:, None, RANK : RANK + N] + B_bias
    C = projected[:, None, -N:] + C_bias
    return x, delta, B_, C, z, layer["A"] if A is None else A


def test_mamba_inner_fn(layer, random):
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, mamba_inner_fn_no_out_proj, mamba_inner_ref

    biases = {"B_proj_bias": random(N), "C_proj_bias": random(N)}
    x, delta, B_, C, z, A = inner(layer, None, None, *(bias[:, None] for bias in biases.values()))
    y = scan(x, delta, A, B_, C, layer["D"], z, layer["delta_bias"], True)[0]
    expected = F.linear(y.mT, layer["out_proj_weight"], layer["out_proj_bias"])
    for function in (mamba_inner_fn, mamba_inner_ref):
        torch.testing.assert_close(function(**layer, **biases), expected, **EXACT)
    less = {name: value for name, value in layer.items() if not name.startswith("out_proj")}
    torch.testing.assert_close(mamba_inner_fn_no_out_proj(**less, **biases), y, **EXACT)


def test_mamba_inner_fn_takes_b_and_c(layer, random):
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

    fixed = {"B": random(D, N), "C": random(B, N, L)}
    x, delta, _, _, z, A = inner(layer)
    # A constant B per channel: as many groups as channels.
    steps = fixed["B"][None, :, :, None].expand(B, D, N, L)
    read = fixed["C"][:, None].expand(B, D, N, L)
    y = scan(x, delta, A, steps, read, layer["D"], z, layer["delta_bias"], True)[0]
    expected = F.linear(y.mT, layer["out_proj_weight"], layer["out_proj_bias"])
    torch.testing.assert_close(mamba_inner_fn(**layer, **fixed), expected, **EXACT)


def test_mamba_inner_fn_with_norms(layer, random):
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

    weights = {"b_rms_weight": random(N), "c_rms_weight": random(N), "dt_rms_weight": random(D)}
    x, delta, B_, C, z, A = inner(layer)

    def norm(value, weight, axis):
        value = np.asarray(value)
        shape = [1] * value.ndim
        shape[axis] = -1
        return value / np.sqrt(np.mean(value**2, axis, keepdims=True) + 1e-6) * np.asarray(weight).reshape(shape)

    B_, C = norm(B_, weights["b_rms_weight"], 2), norm(C, weights["c_rms_weight"], 2)
    delta = norm(delta, weights["dt_rms_weight"], 1)
    y = scan(x, delta, A, B_, C, layer["D"], z, layer["delta_bias"], True)[0]
    expected = F.linear(y.mT, layer["out_proj_weight"], layer["out_proj_bias"])
    torch.testing.assert_close(mamba_inner_fn(**layer, **weights), expected, **EXACT)


def test_bimamba_inner_fn(layer, random):
    from mamba_ssm.ops.selective_scan_interface import bimamba_inner_fn

    A_b = -random(D, N).exp()
    x, delta, B_, C, z, A = inner(layer)
    arguments = (layer["D"], layer["delta_bias"])
    forwards = scan(x, delta, A, B_, C, arguments[0], z, arguments[1], True)[0]
    reverse = [value.flip(-1) for value in (x, delta, B_, C, z)]
    backwards = scan(*reverse[:2], A_b, *reverse[2:4], arguments[0], reverse[4], arguments[1], True)[0].flip(-1)
    expected = F.linear((forwards + backwards).mT, layer["out_proj_weight"], layer["out_proj_bias"])
    torch.testing.assert_close(bimamba_inner_fn(A_b=A_b, **layer), expected, **EXACT)


@pytest.mark.parametrize("heads", [None, 4])
def test_selective_state_update_is_a_step_of_the_scan(random, heads):
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    lead = () if heads is None else (heads,)
    groups = () if heads is None else (2,)
    state = random(B, *lead, D, N)
    start = state.numpy().copy()
    x, dt, z = random(B, *lead, D), random(B, *lead, D), random(B, *lead, D)
    A, B_, C = -random(*lead, D, N).exp(), random(B, *groups, N), random(B, *groups, N)
    D_, bias = random(*lead, D), random(*lead, D)
    y = selective_state_update(state, x, dt, A, B_, C, D_, z=z, dt_bias=bias, dt_softplus=True)
    for index in np.ndindex(B, *lead, D):
        b, rest = index[0], index[1:]
        group = (b,) if heads is None else (b, rest[0] // 2)
        step = softplus((dt[index] + bias[rest]).item())
        h = np.exp(step * A[rest].numpy()) * start[index] + step * B_[group].numpy() * x[index].item()
        out = (h @ C[group].numpy() + D_[rest].item() * x[index].item()) * silu(z[index].item())
        np.testing.assert_allclose(state[index].numpy(), h, rtol=1e-10)
        np.testing.assert_allclose(y[index].item(), out, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_causal_conv1d(random, activation):
    from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    from causal_conv1d_cuda import causal_conv1d_fwd

    x, weight, bias = random(B, D, L), random(D, WIDTH), random(D)
    expected = convolve(x, weight, bias).numpy()
    expected = torch.from_numpy(expected if activation is None else silu(expected))
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias, activation=activation), expected, **EXACT)
    for none in ((), (None,), (None, None, None)):  # as the releases since 1.0 have it
        torch.testing.assert_close(causal_conv1d_fwd(x, weight, bias, *none, activation is not None), expected, **EXACT)

    # The first half, and from its state the second, at once or a step at a time.
    half = 4
    first, state = causal_conv1d_fn(x[..., :half], weight, bias, return_final_states=True, activation=activation)
    assert state.shape == (B, D, WIDTH - 1)
    second = causal_conv1d_fn(x[..., half:], weight, bias, initial_states=state, activation=activation)
    torch.testing.assert_close(torch.cat([first, second], -1), expected, **EXACT)
    at_once, running = state.clone(), state.clone()
    together = causal_conv1d_update(x[..., half:], at_once, weight, bias, activation)
    torch.testing.assert_close(together, expected[..., half:], **EXACT)
    for t in range(half, L):
        step = causal_conv1d_update(x[..., t], running, weight, bias, activation)
        torch.testing.assert_close(step, expected[..., t], **EXACT)
    torch.testing.assert_close(running, x[..., -(WIDTH - 1) :], **EXACT)
    torch.testing.assert_close(at_once, running, **EXACT)


def test_causal_conv1d_of_the_first_releases_and_without_bias(random):
    from causal_conv1d import causal_conv1d_fn

    x, weight = random(B, D, L), random(D, WIDTH)
    expected = torch.from_numpy(silu(convolve(x, weight).numpy()))
    torch.testing.assert_close(causal_conv1d_fn(x, weight, None, "silu"), expected, **EXACT)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("per_element", [False, True])
def test_mamba_chunk_scan_combined(random, groups, per_element):
    from mamba2.ssd_minimal import selective_scan_chunk_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    heads, width = 4, 3
    x, dt, z = random(B, L, heads, width), random(B, L, heads), random(B, L, heads, width)
    A, B_, C = -random(heads).exp(), random(B, L, groups, N), random(B, L, groups, N)
    D_ = random(heads, width) if per_element else random(heads)
    options = {"dt_bias": random(heads), "dt_softplus": True, "dt_limit": (0.1, 0.9)}
    states = random(B, heads, width, N)
    expected, last = ssd(x, dt, A, B_, C, D_, z, initial=states, **options)
    options |= {"D": D_, "z": z, "initial_states": states, "return_final_states": True}
    for function in (mamba_chunk_scan_combined, selective_scan_chunk_fn):
        y, final = function(x, dt, A, B_, C, 4, **options)
        torch.testing.assert_close(y, expected, **EXACT)
        torch.testing.assert_close(final, last, **EXACT)


@pytest.mark.parametrize("gate", ["no norm", "norm first", "gate first"])
@pytest.mark.parametrize("beside", [0, 2])
def test_mamba_split_conv1d_scan_combined(random, gate, beside):
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    heads, width, groups = 4, 3, 2
    inner_size, state = heads * width, groups * N
    sizes = [beside, beside, inner_size, inner_size + 2 * state, heads]
    zxbcdt = random(B, L, sum(sizes))
    weight, bias = random(inner_size + 2 * state, WIDTH), random(inner_size + 2 * state)
    dt_bias, A, D_ = random(heads), -random(heads).exp(), random(heads)
    norm, out, out_bias = random(inner_size), random(MODEL, beside + inner_size), random(MODEL)

    z0, x0, z, xbc, dt = np.split(zxbcdt.numpy(), np.cumsum(sizes)[:-1], -1)
    xbc = silu(convolve(torch.from_numpy(xbc).mT, weight, bias).mT.numpy())
    x, B_, C = np.split(xbc, [inner_size, inner_size + state], -1)
    shape = (B, L, groups, N)
    gating = z.reshape(B, L, heads, width) if gate == "no norm" else None
    y, last = ssd(
        x.reshape(B, L, heads, width), dt, A, B_.reshape(shape), C.reshape(shape), D_, gating, dt_bias, None, True
    )
    y = y.numpy().reshape(B, L, inner_size)

    def normed(value):
        value = value.reshape(B, L, groups, -1)
        value = value / np.sqrt(np.mean(value**2, -1, keepdims=True) + 1e-5)
        return value.reshape(B, L, inner_size) * norm.numpy()

    if gate == "norm first":
        y = normed(y) * silu(z)
    elif gate == "gate first":
        y = normed(y * silu(z))
    expected = np.concatenate([silu(z0) * x0, y], -1) @ out.numpy().T + out_bias.numpy()
    result, states = mamba_split_conv1d_scan_combined(
        zxbcdt,
        weight,
        bias,
        dt_bias,
        A,
        D_,
        chunk_size=4,
        return_final_states=True,
        rmsnorm_weight=None if gate == "no norm" else norm,
        rmsnorm_eps=1e-5,
        outproj_weight=out,
        outproj_bias=out_bias,
        headdim=width,
        ngroups=groups,
        norm_before_gate=gate == "norm first",
    )
    torch.testing.assert_close(result, torch.from_numpy(expected), **EXACT)
    torch.testing.assert_close(states, last, **EXACT)


@pytest.mark.parametrize("is_rms_norm", [False, True])
@pytest.mark.parametrize("others", [(), ("residual",), ("residual", "x1", "rowscale", "weight1", "bias1")])
def test_layer_norm_fn(random, is_rms_norm, others):
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, rms_norm_fn
    from mamba_ssm.ops.triton.layernorm import layer_norm_fn as older

    assert older is layer_norm_fn
    x, weight, bias = random(B, L, D), random(D), random(D)
    shapes = {"residual": (B, L, D), "x1": (B, L, D), "rowscale": (B, L), "weight1": (D,), "bias1": (D,)}
    more = {name: random(*shapes[name]) for name in others}
    total = x.numpy() * (more["rowscale"].numpy()[..., None] if "rowscale" in more else 1)
    total = total + sum(more[name].numpy() for name in ("residual", "x1") if name in more)

    def norm(weight, bias):
        centred = total if is_rms_norm else total - total.mean(-1, keepdims=True)
        return centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-3) * weight.numpy() + bias.numpy()

    expected = [norm(weight, bias)]
    if "weight1" in more:
        expected.append(norm(more["weight1"], more["bias1"]))
    residual = more.pop("residual", None)
    function = rms_norm_fn if is_rms_norm else layer_norm_fn
    for prenorm in (False, True):
        result = function(x, weight, bias, residual, eps=1e-3, prenorm=prenorm, residual_in_fp32=True, **more)
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        wanted = [torch.from_numpy(value) for value in (*expected, *([total] if prenorm else []))]
        torch.testing.assert_close(results, wanted, **EXACT)


def test_the_residual_keeps_its_dtype(random):
    from mamba_ssm.ops.triton.layer_norm import RMSNorm, layer_norm_fn

    x, weight, bias = random(B, L, D).half(), random(D).half(), random(D).half()
    for residual, in_fp32, dtype in (
        (None, False, torch.float16),
        (None, True, torch.float32),
        (x, True, torch.float16),
        (x.float(), False, torch.float32),
    ):
        y, total = layer_norm_fn(x, weight, bias, residual, prenorm=True, residual_in_fp32=in_fp32)
        assert (y.dtype, total.dtype) == (torch.float16, dtype)
    assert RMSNorm(D)(x.float(), x.float(), prenorm=True)[1].dtype == torch.float32


def test_layer_norm_linear_fn(random):
    from mamba_ssm.ops.triton.layer_norm import layer_norm_linear_fn

    x, weight, matrix = random(B, L, D), random(D), random(MODEL, D)
    expected = F.linear(F.rms_norm(x, (D,), weight, 1e-6), matrix)
    y = layer_norm_linear_fn(x, weight, None, matrix, None, is_rms_norm=True)
    torch.testing.assert_close(y, expected, **EXACT)


@pytest.mark.parametrize("group_size", [None, 3])
@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_gated_norms(random, group_size, norm_before_gate, kind):
    from mamba_ssm.ops.triton import layernorm_gated

    module = getattr(layernorm_gated, kind)(D, 1e-3, group_size, norm_before_gate).double()
    x, z = random(B, L, D), random(B, L, D)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(random(D))
    value = x.numpy() * (1 if norm_before_gate else silu(z.numpy()))
    value = value.reshape(B, L, -1, group_size or D)
    if kind == "LayerNorm":
        value = value - value.mean(-1, keepdims=True)
    value = (value / np.sqrt(np.mean(value**2, -1, keepdims=True) + 1e-3)).reshape(B, L, D)
    value = value * module.weight.detach().numpy()
    value = value + (module.bias.detach().numpy() if kind == "LayerNorm" else 0)
    value = value * (silu(z.numpy()) if norm_before_gate else 1)
    torch.testing.assert_close(module(x, z).detach(), torch.from_numpy(value), **EXACT)


def routes(height, width, scans):
    """For each of the four directions, the position on the map of each step."""
    rows = np.arange(height * width)
    columns = rows.reshape(height, width).T.ravel()
    return {
        0: [rows, columns, rows[::-1], columns[::-1]],
        1: [rows] * 4,
        2: [rows, rows, rows[::-1], rows[::-1]],
    }[scans]


@pytest.mark.parametrize("scans", [0, 1, 2])
@pytest.mark.parametrize("out_first", [False, True])
@pytest.mark.parametrize("in_first", [False, True])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_cross_scan_and_merge(random, scans, out_first, in_first, one_by_one):
    from csm_triton import cross_merge_fn, cross_scan_fn

    height, width = 3, 5
    length = height * width
    maps = random(B, 4, D, height, width) if one_by_one else random(B, 1, D, height, width).repeat(1, 4, 1, 1, 1)
    x = maps if one_by_one else maps[:, 0]
    x = x if in_first else (x.permute(0, 3, 4, 1, 2) if one_by_one else x.permute(0, 2, 3, 1))
    flat = maps.flatten(3)
    paths = [torch.from_numpy(path.copy()) for path in routes(height, width, scans)]
    expected = torch.stack([flat[:, k][..., path] for k, path in enumerate(paths)], 1)
    y = cross_scan_fn(x, in_first, out_first, one_by_one, scans)
    assert torch.equal(y if out_first else y.permute(0, 2, 3, 1), expected)

    sequences = random(B, 4, D, length)
    back = torch.zeros(B, 4, D, length, dtype=torch.float64)
    for k, path in enumerate(paths):
        back[:, k][..., path] = sequences[:, k]
    wanted = back if one_by_one else back.sum(1)
    given = sequences.view(B, 4, D, height, width)
    merged = cross_merge_fn(
        given if out_first else given.permute(0, 3, 4, 1, 2), in_first, out_first, one_by_one, scans
    )
    if not in_first:
        merged = merged.permute(0, 2, 3, 1) if one_by_one else merged.mT
    torch.testing.assert_close(merged, wanted, **EXACT)


@pytest.mark.parametrize("scans", [0, 1, 2])
def test_the_classes_of_older_vmamba(random, scans):
    from csm_triton import CrossMergeTriton, CrossScanTriton, cross_merge_fn, cross_scan_fn, getCSM

    x, y = random(B, D, 3, 5), random(B, 4, D, 3, 5)
    scan_class, merge_class = getCSM(scans)
    assert torch.equal(scan_class.apply(x), cross_scan_fn(x, scans=scans))
    assert torch.equal(merge_class.apply(y), cross_merge_fn(y, scans=scans))
    assert torch.equal(CrossScanTriton.apply(x), cross_scan_fn(x))
    assert torch.equal(CrossMergeTriton.apply(y), cross_merge_fn(y))


def test_float32_stays_float32_and_is_close(operands):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    y = selective_scan_fn(*(value.float() for value in operands), delta_softplus=True)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), scan(*operands, True)[0], **FLOAT32)


def test_gradients_flow(operands):
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    leaves = [value.clone().requires_grad_() for value in operands]
    selective_scan_fn(*leaves, delta_softplus=True).sum().backward()
    assert all(leaf.grad is not None and math.isfinite(leaf.grad.abs().sum()) for leaf in leaves)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("causal_conv1d.causal_conv1d_fn(x, w, seq_idx=x)", "drop seq_idx"),
        ("causal_conv1d.causal_conv1d_fn(x, w, activation='relu')", "not 'relu'"),
        ("causal_conv1d.causal_conv1d_update(x, x, w, cache_seqlens=x)", "cache_seqlens"),
        ("causal_conv1d_cuda.causal_conv1d_fwd(x, w, None, x, True)", "activation alone"),
        ("layer_norm.layer_norm_fn(x, w, w, dropout_p=0.1)", "dropout_p=0"),
        ("ssd_combined.mamba_chunk_scan_combined(x, x, x, x, x, 4, seq_idx=x)", "drop seq_idx"),
        ("generation.decode(x)", "decode for the import only"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(call, message):
    import causal_conv1d
    import causal_conv1d_cuda
    from mamba_ssm.ops.triton import layer_norm, ssd_combined
    from mamba_ssm.utils import generation

    names = {
        "causal_conv1d": causal_conv1d,
        "causal_conv1d_cuda": causal_conv1d_cuda,
        "layer_norm": layer_norm,
        "ssd_combined": ssd_combined,
        "generation": generation,
    }
    with pytest.raises(UnsupportedOpError, match=message) as refusal:
        eval(call, names | {"x": torch.zeros(1, 2, 3), "w": torch.zeros(2, 2)})
    assert "\n" not in str(refusal.value)
