"""The stand-ins' modules: parameters as published checkpoints have them, and what they compute."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mobilemix.errors import UnknownNameError, UnsupportedOpError
from mobilemix.shims import shim

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _inside():
    torch.manual_seed(0)
    with shim("mamba"):
        yield


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


# mamba-130m: 768 wide, dt_rank 48.
MAMBA_130M = {
    "A_log": (1536, 16),
    "D": (1536,),
    "in_proj.weight": (3072, 768),
    "conv1d.weight": (1536, 1, 4),
    "conv1d.bias": (1536,),
    "x_proj.weight": (80, 1536),
    "dt_proj.weight": (1536, 48),
    "dt_proj.bias": (1536,),
    "out_proj.weight": (768, 1536),
}
# mamba2-130m: 768 wide, state 128, heads of 64, one group.
MAMBA2_130M = {
    "dt_bias": (24,),
    "A_log": (24,),
    "D": (24,),
    "in_proj.weight": (3352, 768),
    "conv1d.weight": (1792, 1, 4),
    "conv1d.bias": (1792,),
    "norm.weight": (1536,),
    "out_proj.weight": (768, 1536),
}


def further(suffix, size, state, rank):
    """What a fork's further direction adds."""
    return {
        f"A{suffix}_log": (size, state),
        f"D{suffix}": (size,),
        f"conv1d{suffix}.weight": (size, 1, 4),
        f"conv1d{suffix}.bias": (size,),
        f"x_proj{suffix}.weight": (rank + 2 * state, size),
        f"dt_proj{suffix}.weight": (size, rank),
        f"dt_proj{suffix}.bias": (size,),
    }


def test_the_parameters_of_mamba():
    from mamba_ssm import Mamba

    assert shapes(Mamba(768, device="meta")) == MAMBA_130M
    # Vision Mamba-T: 192 wide, rank 12, backwards with weights of its own.
    vim = shapes(Mamba(192, bimamba_type="v2", if_divide_out=True, init_layer_scale=1e-4, device="meta"))
    assert vim.pop("gamma") == (192,)
    assert vim == shapes(Mamba(192, bimamba=True, device="meta"))  # VideoMamba's name for it
    assert further("_b", 384, 16, 12).items() <= vim.items()
    assert len(vim) == len(MAMBA_130M) + 7
    assert shapes(Mamba(768, bimamba_type="v1", device="meta")) == {**MAMBA_130M, "A_b_log": (1536, 16)}
    seg = shapes(Mamba(48, bimamba_type="v3", nslices=64, device="meta"))
    assert {**further("_b", 96, 16, 3), **further("_s", 96, 16, 3)}.items() <= seg.items()
    options = shapes(Mamba(64, d_state=8, d_conv=3, expand=1, dt_rank=6, bias=True, conv_bias=False, device="meta"))
    assert options["in_proj.bias"] == (128,)
    assert options["out_proj.bias"] == (64,)
    assert "conv1d.bias" not in options
    assert options["conv1d.weight"] == (64, 1, 3)
    assert options["x_proj.weight"] == (22, 64)


def test_the_parameters_of_mamba2():
    from mamba_ssm import Mamba2
    from mamba_ssm.modules.mamba2_simple import Mamba2Simple

    assert shapes(Mamba2(768, device="meta")) == MAMBA2_130M
    options = shapes(Mamba2(64, d_state=16, headdim=16, ngroups=2, d_ssm=64, D_has_hdim=True, rmsnorm=False))
    assert options["in_proj.weight"] == (2 * 128 + 2 * 2 * 16 + 4, 64)
    assert options["conv1d.weight"] == (64 + 2 * 2 * 16, 1, 4)
    assert options["D"] == (64,)
    assert "norm.weight" not in options
    simple = shapes(Mamba2Simple(256, learnable_init_states=True))
    assert simple.pop("init_states") == (4, 128, 64)
    assert simple["in_proj.weight"] == (2 * 512 + 2 * 64 + 4, 256)
    assert simple.keys() == MAMBA2_130M.keys()


def test_the_parameters_of_blocks_and_norms():
    from mamba_ssm.modules.block import Block
    from mamba_ssm.modules.mamba_simple import Block as MambaBlock
    from mamba_ssm.modules.mlp import GatedMLP
    from mamba_ssm.ops.triton.layer_norm import RMSNorm

    mixer = lambda dim: nn.Linear(dim, dim, bias=False)  # noqa: E731
    assert shapes(MambaBlock(8, mixer, RMSNorm)) == {"norm.weight": (8,), "mixer.weight": (8, 8)}
    assert shapes(Block(8, mixer, nn.Identity)) == {"norm.weight": (8,), "norm.bias": (8,), "mixer.weight": (8, 8)}
    assert shapes(Block(8, mixer, GatedMLP, RMSNorm)) == {
        "norm.weight": (8,),
        "mixer.weight": (8, 8),
        "mlp.fc1.weight": (256, 8),
        "mlp.fc2.weight": (8, 128),
        "norm2.weight": (8,),
    }


def test_initial_steps_and_decays():
    from mamba_ssm import Mamba, Mamba2

    layer = Mamba(64, dt_min=0.01, dt_max=0.05)
    steps = F.softplus(layer.dt_proj.bias)
    assert 0.0099 < steps.min() < 0.02 < 0.03 < steps.max() < 0.0501
    torch.testing.assert_close(layer.A_log.exp()[5], torch.arange(1.0, 17.0))
    assert F.softplus(Mamba(64, dt_init_floor=0.2).dt_proj.bias).min() > 0.199
    decay = Mamba2(256).A_log.exp()
    assert 1 <= decay.min() < decay.max() <= 16


def layer_by_hand(layer, xz, suffix=""):
    """One scan of a Mamba layer from its parameters, with a convolution of torch and a loop over time."""
    state = layer.state_dict()

    def get(name):
        module, dot, parameter = name.partition(".")
        return state[f"{module}{suffix}{dot}{parameter}"]

    x, z = xz.chunk(2, -1)  # (b, l, d)
    weight = get("conv1d.weight")
    x = F.silu(F.conv1d(x.mT, weight, get("conv1d.bias"), padding=3, groups=len(weight))[..., : x.shape[1]]).mT
    rank = get("dt_proj.weight").shape[1]
    dt, B, C = (x @ get("x_proj.weight").T).split([rank, 16, 16], -1)
    dt = F.softplus(dt @ get("dt_proj.weight").T + get("dt_proj.bias"))
    A = -state[f"A{suffix}_log"].exp()
    h, y = torch.zeros(len(x), *A.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        h = (dt[:, t, :, None] * A).exp() * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
        y.append((h * C[:, t, None]).sum(-1))
    return (torch.stack(y, 1) + x * get("D")) * F.silu(z)


@pytest.mark.parametrize("kind", ["none", "v2", "v3"])
def test_mamba_computes_its_scans(kind):
    from mamba_ssm import Mamba

    layer = Mamba(32, bimamba_type=kind, nslices=3, if_divide_out=kind == "v2", init_layer_scale=0.5).double()
    u = torch.randn(2, 12, 32, dtype=torch.float64)
    xz = layer.in_proj(u)
    y = layer_by_hand(layer, xz)
    if kind != "none":
        y = y + layer_by_hand(layer, xz.flip(1), "_b").flip(1)
    if kind == "v3":
        order = torch.arange(12).view(3, 4).T.flatten()
        across = torch.zeros_like(y)
        across[:, order] = layer_by_hand(layer, xz[:, order], "_s")
        y = y + across
    expected = layer.out_proj(y / 2 if kind == "v2" else y) * 0.5
    torch.testing.assert_close(layer(u), expected, **EXACT)


def test_mamba_with_shared_weights_both_ways():
    from mamba_ssm import Mamba

    layer = Mamba(32, bimamba_type="v1").double()
    with torch.no_grad():
        layer.A_b_log.add_(torch.rand_like(layer.A_b_log))
    u = torch.randn(2, 9, 32, dtype=torch.float64)
    # Backwards, the convolution stays causal forwards: scan what comes out of it from the end.
    x, z = layer.in_proj(u).mT.chunk(2, 1)
    x = F.silu(layer.conv1d(x)[..., :9])
    dt, B, C = layer.x_proj(x.mT).mT.split([layer.dt_rank, 16, 16], 1)
    dt = F.softplus(layer.dt_proj(dt.mT).mT)
    total = 0
    for decay, flip in ((layer.A_log, False), (layer.A_b_log, True)):
        h, read = torch.zeros(2, 64, 16, dtype=u.dtype), [None] * 9
        for t in reversed(range(9)) if flip else range(9):
            h = (-dt[..., t, None] * decay.exp()).exp() * h + (dt * x)[..., t, None] * B[:, None, :, t]
            read[t] = (h * C[:, None, :, t]).sum(-1)
        total = total + (torch.stack(read, -1) + x * layer.D[:, None]) * F.silu(z)
    torch.testing.assert_close(layer(u), layer.out_proj(total.mT), **EXACT)


@pytest.mark.parametrize("options", [{}, {"ngroups": 2}, {"d_ssm": 64}, {"rmsnorm": False, "D_has_hdim": True}])
def test_mamba2_computes_its_scan(options):
    from mamba_ssm import Mamba2

    layer = Mamba2(64, d_state=8, headdim=32, **options).double()
    u = torch.randn(2, 7, 64, dtype=torch.float64)
    groups, inner, state, heads = layer.ngroups, layer.d_ssm, layer.ngroups * 8, layer.nheads
    beside = 128 - inner
    with torch.no_grad():
        z0, x0, z, xbc, dt = layer.in_proj(u).split([beside, beside, inner, inner + 2 * state, heads], -1)
        xbc = F.silu(layer.conv1d(xbc.mT)[..., :7]).mT
        x, B, C = xbc.split([inner, state, state], -1)
        x = x.view(2, 7, heads, 32)
        B, C = (value.view(2, 7, groups, 8).repeat_interleave(heads // groups, 2) for value in (B, C))
        dt, A = F.softplus(dt + layer.dt_bias), -layer.A_log.exp()
        h, y = torch.zeros(2, heads, 32, 8, dtype=u.dtype), []
        for t in range(7):
            h = (dt[:, t] * A).exp()[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
            y.append((h * C[:, t, :, None]).sum(-1))
        y = torch.stack(y, 1) + x * (layer.D.view(heads, 32) if layer.D_has_hdim else layer.D[:, None])
        y = y.flatten(2) * F.silu(z)
        if layer.rmsnorm:
            size = inner // groups
            y = torch.cat([F.rms_norm(part, (size,), None, 1e-5) for part in y.split(size, -1)], -1) * layer.norm.weight
        expected = layer.out_proj(torch.cat([F.silu(z0) * x0, y], -1))
        torch.testing.assert_close(layer(u), expected, **EXACT)
        torch.testing.assert_close(layer(u.flatten(0, 1), seqlen=7), expected.flatten(0, 1), **EXACT)


def test_mamba2_simple_begins_with_its_states():
    from mamba_ssm.modules.mamba2_simple import Mamba2Simple

    layer = Mamba2Simple(64, d_state=8, headdim=32, learnable_init_states=True).double()
    u = torch.randn(2, 7, 64, dtype=torch.float64)
    without = layer(u)
    with torch.no_grad():
        layer.init_states.normal_()
    assert not torch.allclose(layer(u), without)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_blocks_add_late(fused, norm):
    from mamba_ssm.modules.block import Block
    from mamba_ssm.modules.mlp import GatedMLP
    from mamba_ssm.ops.triton.layer_norm import RMSNorm

    mixer = lambda dim: nn.Linear(dim, dim)  # noqa: E731
    block = Block(8, mixer, GatedMLP, RMSNorm if norm == "rms" else nn.LayerNorm, fused, residual_in_fp32=True).double()
    x, residual = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    for before in (None, residual):
        total = x if before is None else x + before
        after = total + block.mixer(block.norm(total))
        y, kept = block(x, before)
        torch.testing.assert_close(kept, after, **EXACT)
        torch.testing.assert_close(y, block.mlp(block.norm2(after)), **EXACT)


def test_gated_mlp():
    from mamba_ssm.modules.mlp import GatedMLP

    mlp, x = GatedMLP(6, 10, 5, multiple_of=4).double(), torch.randn(3, 6, dtype=torch.float64)
    y, gate = mlp.fc1(x).split(12, -1)
    torch.testing.assert_close(mlp(x), (y * gate * torch.sigmoid(gate)) @ mlp.fc2.weight.T, **EXACT)


def test_what_layers_do_not_take():
    from mamba_ssm import Mamba, Mamba2
    from mamba_ssm.utils.generation import InferenceParams

    with pytest.raises(UnknownNameError, match="unknown bimamba_type 'v4'. Valid: none, v1, v2, v3"):
        Mamba(8, bimamba_type="v4")
    for layer in (Mamba(8), Mamba2(64)):
        with pytest.raises(UnsupportedOpError, match="inference_params"):
            layer(torch.zeros(1, 2, layer.d_model), inference_params=InferenceParams(2, 1))
    with pytest.raises(UnsupportedOpError, match="process_group"):
        Mamba2(64, process_group=object())
