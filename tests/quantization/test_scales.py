import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import trained
from torch import Tensor, nn
from torch.export import ExportedProgram

from mobilemix.models import registry
from mobilemix.passes import lower
from mobilemix.passes.base import interface
from mobilemix.quantization import scales
from mobilemix.quantization.scales import FIXED, Families

TOLERANCE = 1e-12
SMALL_INPUT = 64


def lowered(module: nn.Module, *inputs: Tensor) -> ExportedProgram:
    for each in module.modules():
        if isinstance(each, nn.GroupNorm | nn.LayerNorm | nn.BatchNorm2d):
            trained(each)
    return lower(torch.export.export(module.eval(), inputs))


def drawn(count: int, exact: bool) -> Tensor:
    """Factors between 1/8 and 8, powers of two if the result should be exact."""
    exponents = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6 - 3
    factors = (exponents.round() if exact else exponents).exp2()
    factors[FIXED] = 1
    return factors


def run(program: ExportedProgram, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        answers = program.module()(*inputs)
    return list(answers) if isinstance(answers, tuple | list) else [answers]


def scaled(program: ExportedProgram, exact: bool = True) -> ExportedProgram:
    """A program whose families have random factors, which some of its weights have to make up for."""
    before = str(program.graph)
    families = Families(program)
    result = families.scaled(drawn(families.count, exact))
    assert str(program.graph) == before
    assert interface(result) == interface(program)
    assert any(not torch.equal(value, program.state_dict[name]) for name, value in result.state_dict.items())
    return result


@pytest.mark.parametrize("name", ["affnet_et", "casvit_xs", "efficientvim_m1", "dualtoken_vit_tiny"])
def test_the_families_of_backbones_compute_the_same_to_the_last_bit(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 3, SMALL_INPUT, SMALL_INPUT)
    program = lowered(registry.create_model(name), x)
    assert torch.equal(run(scaled(program), x)[0], run(program, x)[0])


WIDTH, SIDE = 4, 6


class Residual(nn.Module):
    def __init__(self, *inside: nn.Module) -> None:
        super().__init__()
        self.inside = nn.Sequential(*inside)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


class Squeeze(nn.Module):
    """Channels gated by what their means say."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Conv2d(WIDTH, 3 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(1, (2, WIDTH // 2)).flatten(3) for part in self.qkv(x).chunk(3, 1))
        return (v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)).reshape(x.shape)


class Branches(nn.Module):
    """Two halves, of which one is convolved, shuffled together again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH // 2, WIDTH // 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        return torch.stack([left, self.conv(right)], 2).flatten(1, 2)


class Tokens(nn.Module):
    """A linear map of channels, and one of positions, which passes the channels on."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Parameter(torch.randn(SIDE * SIDE, SIDE * SIDE))

    def forward(self, x: Tensor) -> Tensor:
        return self.channels((x.flatten(2) @ self.mix).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class Affine(nn.Module):
    """What a norm written out ends with, behind something that is not passed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(WIDTH, 1, 1) + 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (self.bias - x.tanh() * self.weight) / (1 + self.weight.abs())


class Elementwise(nn.Module):
    def __init__(self, function: str) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return {
            "halve": lambda x: 0.5 * x,
            "negate": lambda x: -x,
            "add to pooled": lambda x: x + x.amax((2, 3), keepdim=True),
            "subtract mean": lambda x: x - x.mean(1, keepdim=True),
            "square": lambda x: x * x,
            "roll": lambda x: x.roll(1, 1),
            "clamp": lambda x: x.clamp(min=0),
            "clip": lambda x: x.clamp(0, 1),
            "one more": lambda x: x + 1,
            "invert": lambda x: 1 / (1 + x.abs()),
            "max over channels": lambda x: x * x.amax(1, keepdim=True).sigmoid(),
        }[self.function](x)


def _conv(size: int = 3, groups: int = 1, **options: bool) -> nn.Module:
    return nn.Conv2d(WIDTH, WIDTH, size, padding=size // 2, groups=groups, **options)


BLOCKS = {
    "conv": _conv,
    "pointwise": lambda: _conv(1, bias=False),
    "depthwise": lambda: _conv(groups=WIDTH),
    "grouped": lambda: _conv(groups=2),
    "transposed": lambda: nn.ConvTranspose2d(WIDTH, WIDTH, 3, padding=1, groups=2),
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.1),
    "gelu": nn.GELU,
    "max": lambda: nn.MaxPool2d(3, 1, 1),
    "mean": lambda: nn.AvgPool2d(3, 1, 1),
    "shuffle": lambda: nn.ChannelShuffle(2),
    "batch norm": lambda: nn.BatchNorm2d(WIDTH),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "residual": lambda: Residual(_conv(), nn.ReLU(), _conv(1)),
    "identity added": lambda: Residual(_conv(groups=WIDTH)),
    "squeeze": Squeeze,
    "attention": Attention,
    "branches": Branches,
    "tokens": Tokens,
    "affine": Affine,
    **{name: lambda name=name: Elementwise(name) for name in ("halve", "negate", "add to pooled", "subtract mean")},
    **{name: lambda name=name: Elementwise(name) for name in ("square", "roll", "clamp", "clip", "one more")},
    **{name: lambda name=name: Elementwise(name) for name in ("invert", "max over channels")},
}


@given(names=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_any_network_computes_the_same(names: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    blocks = [BLOCKS[name]() for name in names]
    module = nn.Sequential(_conv(), *blocks, _conv(1), nn.ReLU(), nn.Flatten(), nn.Linear(WIDTH * SIDE * SIDE, 3))
    x = torch.randn(2, WIDTH, SIDE, SIDE, dtype=torch.float64)
    program = lowered(module.double(), x)
    (one,), (other,) = run(scaled(program, exact=False), x), run(program, x)
    assert (one - other).norm() <= TOLERANCE * other.norm()


def layers(*inside: nn.Module) -> tuple[Families, ExportedProgram]:
    """Families of a network that starts with a convolution and relu and ends with a convolution, and its program."""
    module = nn.Sequential(_conv(), nn.ReLU(), *inside, _conv(1))
    program = lowered(module, torch.randn(1, WIDTH, SIDE, SIDE))
    return Families(program), program


@pytest.mark.parametrize("block", ["relu", "leaky", "max", "mean", "clamp", "negate", "squeeze", "roll"])
def test_pairs(block: str) -> None:
    families, _ = layers(BLOCKS[block]())
    assert families.count == 1 + WIDTH
    first, last = families.layers[0], families.layers[-1]
    assert sorted(first.outputs.tolist()) == sorted(last.inputs.tolist()) == [1, 2, 3, 4]
    assert set(first.inputs.tolist()) == set(last.outputs.tolist()) == {FIXED}


@pytest.mark.parametrize("block", ["gelu", "square", "clip", "one more", "invert", "max over channels"])
def test_what_passes_no_factors_on_fixes_them(block: str) -> None:
    families, _ = layers(BLOCKS[block](), nn.ReLU())
    assert families.count == 1


def test_a_shuffled_channel_stays_in_its_family() -> None:
    families, _ = layers(nn.ChannelShuffle(2))
    first, last = families.layers
    assert last.inputs.tolist() == first.outputs[[0, 2, 1, 3]].tolist()


class Moves(nn.Module):
    """Every operator that only moves channels or positions."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = nn.functional.pixel_shuffle(x, 2).flip(3).roll(1, 2)
        y = torch.cat([y, y.narrow(1, 0, 1)[:, :, :0]], 2).repeat(1, 2, 1, 1)
        first, second = y.movedim(1, -1).contiguous().split([1, 1], -1)
        y = torch.stack([first.select(-1, 0), second.unbind(-1)[0]], 1)
        y = y.unsqueeze(2).expand(n, 2, c // 2, 2 * h, 2 * w).clone().view(n, c, 2 * h, 2 * w)
        return y.chunk(2, 2)[0]


def test_whatever_moves_numbers_moves_their_families() -> None:
    families, program = layers(Moves(), nn.ReLU())
    assert families.count == 2, "pixels of all channels lie side by side, and the last layer reads them as one"
    x = torch.randn(1, WIDTH, SIDE, SIDE)
    (one,), (other,) = run(scaled(program), x), run(program, x)
    assert torch.equal(one, other)


def test_a_triple_has_two_sets_of_families() -> None:
    families, _ = layers(BLOCKS["depthwise"](), nn.ReLU())
    first, middle, last = families.layers
    assert families.count == 1 + 2 * WIDTH
    assert first.outputs.tolist() == middle.inputs.tolist()
    assert middle.outputs.tolist() == last.inputs.tolist()
    assert [layer.is_depthwise for layer in families.layers] == [False, True, False]


def test_a_residual_stream_is_one_set_of_families() -> None:
    families, _ = layers(Residual(nn.ReLU(), _conv()), Residual(nn.ReLU(), _conv()))
    assert families.count == 1 + WIDTH
    assert all(layer.outputs.tolist() == [1, 2, 3, 4] for layer in families.layers[:-1])


def test_shared_weights_stay() -> None:
    conv = _conv()
    families, _ = layers(conv, nn.ReLU(), conv, nn.ReLU())
    assert families.count == 1


def test_a_norm_gives_its_channels_factors() -> None:
    families, _ = layers(nn.GELU(), nn.GroupNorm(2, WIDTH), _conv(), nn.GELU())
    assert families.count == 1 + WIDTH
    assert families.layers[1].inputs.tolist() == [1, 2, 3, 4]


def test_ranges_are_those_of_the_scaled_weights() -> None:
    families, _ = layers(_conv(groups=2), nn.ReLU())
    factors = drawn(families.count, exact=False)
    expected = [layer.ranges(factors) for layer in families.layers]
    found = Families(families.scaled(factors)).layers
    one = torch.ones(families.count, dtype=torch.float64)
    for layer, ranges in zip(found, expected, strict=True):
        for mine, theirs in zip(layer.ranges(one), ranges, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
    assert [len(rows) for rows, _ in expected] == [len(columns) for _, columns in expected] == [WIDTH] * 3


def test_an_operator_that_is_wrongly_passed_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scales, "_HOMOGENEOUS", {"gelu", "relu"})
    families, program = layers(nn.GELU())
    x = torch.randn(1, WIDTH, SIDE, SIDE)
    (one,), (other,) = run(families.scaled(drawn(families.count, exact=True)), x), run(program, x)
    assert (one - other).norm() > 1e-3 * other.norm()
