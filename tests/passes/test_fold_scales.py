import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from passes_checks import TOLERANCE, assert_untouched, operators, relative_error, rewritten
from torch import Tensor, nn

from mobilemix.passes import fold_scales
from mobilemix.passes.fold_scales import HEADROOM, FoldScales


class Attention(nn.Module):
    """Scores of queries and keys from one linear map, or from one convolution of an image."""

    def __init__(self, heads: int, form: str):
        super().__init__()
        self.heads, self.form = heads, form
        width = 4 * heads
        self.qkv = nn.Conv2d(6, 3 * width, 1) if form == "image" else nn.Linear(6, 3 * width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.form == "image":
            q, k, v = (part.unflatten(1, (self.heads, 4)).flatten(3) for part in self.qkv(x).chunk(3, 1))
            scores = q.transpose(-2, -1) @ k * 0.5
            return scores, v
        qkv = self.qkv(x)
        width = qkv.shape[-1] // 3
        q, k, v = (
            (qkv[..., i * width : (i + 1) * width] for i in range(3)) if self.form == "slices" else qkv.chunk(3, -1)
        )
        q, k, v = (part.unflatten(-1, (self.heads, 4)).transpose(1, 2) for part in (q, k, v))
        return q @ k.transpose(-2, -1) / 2, v


@given(heads=st.integers(1, 3), form=st.sampled_from(["image", "tokens", "slices"]))
@settings(max_examples=8, deadline=None)
def test_the_scale_of_attention_goes_into_the_queries(heads: int, form: str) -> None:
    module = Attention(heads, form)
    x = torch.randn(2, 6, 3, 4) if form == "image" else torch.randn(2, 5, 6)
    program = rewritten(FoldScales(), module, x)
    assert not {"mul", "div"} & set(operators(program))
    assert relative_error(program, module, x) < TOLERANCE


class ReadBack(nn.Module):
    """A layer scale on what is read from states, in either order of the product."""

    def __init__(self, first: bool):
        super().__init__()
        self.first, self.conv, self.gamma = first, nn.Conv1d(3, 6, 1), nn.Parameter(torch.randn(6, 1, 1))

    def forward(self, states: Tensor, c: Tensor) -> Tensor:
        h = self.conv(states)
        read = h @ c if self.first else (c.transpose(1, 2) @ h.transpose(1, 2)).transpose(1, 2)
        return self.gamma * read.unflatten(-1, (2, 4))


@pytest.mark.parametrize("first", [True, False])
def test_the_scale_of_a_product_goes_to_the_operand_that_has_its_axis(first: bool) -> None:
    module, inputs = ReadBack(first), (torch.randn(2, 3, 5), torch.randn(2, 5, 8))
    program = rewritten(FoldScales(), module, *inputs)
    assert "mul" not in operators(program)
    assert relative_error(program, module, *inputs) < TOLERANCE


def test_positive_scales_pass_relu_and_meet() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.scale = nn.Conv2d(3, 4, 3), nn.Parameter(torch.rand(4, 1, 1) + 0.1)

        def forward(self, x: Tensor) -> Tensor:
            return (self.conv(x).relu() * self.scale).flatten(2) * 3.0

    module, x = Module(), torch.randn(1, 3, 5, 5)
    program = rewritten(FoldScales(), module, x)
    assert operators(program) == {"conv2d": 1, "relu": 1, "flatten": 1}
    assert relative_error(program, module, x) < TOLERANCE


class Blend(nn.Module):
    """A gated branch, and a depthwise convolution behind it that takes the scale of the skip."""

    def __init__(self, rest: float = 0.6, reads_twice: bool = False):
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(4, 8, 1), nn.GELU(), nn.Conv2d(8, 4, 1))
        self.after = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.rest, self.reads_twice = nn.Parameter(torch.full((4, 1, 1), rest)), reads_twice

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        y = self.rest * x + self.branch(x)
        return (self.after(y), y) if self.reads_twice else self.after(y)


def test_the_scale_of_a_skip_goes_behind_the_sum() -> None:
    module, x = Blend(), torch.randn(1, 4, 5, 5)
    program = rewritten(FoldScales(), module, x)
    assert operators(program) == {"conv2d": 3, "gelu": 1, "add": 1}
    assert relative_error(program, module, x) < TOLERANCE


class Several(nn.Module):
    """The value that would be scaled is used elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x)
        return y.unsqueeze(0) * 0.5, y


class Nonlinear(Several):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.fc(x).tanh() * 0.5


class Negative(Several):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.fc(x).relu() * -0.5


class Squared(Several):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        y = self.fc(x)
        return (y @ y) * 0.5


class Heads(Several):
    """Scales of heads, of which each is several channels."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.fc(x).unflatten(-1, (2, 2)) * torch.tensor([[0.5], [2.0]])


class Inverse(Several):
    """Factors whose product is one but for the last bits."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return (x * 0.5).unsqueeze(0) * 2.0001


class Logits(Several):
    """As large a factor as cosine attention has."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.fc(x) @ x.T * (2 * HEADROOM)


@pytest.mark.parametrize(
    "module",
    [Several(), Nonlinear(), Negative(), Squared(), Heads(), Inverse(), Logits()],
    ids=lambda m: type(m).__name__,
)
def test_what_weights_cannot_do_stays(module: nn.Module) -> None:
    assert_untouched(FoldScales(), module, torch.randn(4, 4))


@pytest.mark.parametrize("module", [Blend(0.9 / HEADROOM), Blend(reads_twice=True)], ids=["small", "another user"])
def test_what_would_grow_or_is_read_elsewhere_stays(module: nn.Module) -> None:
    assert_untouched(FoldScales(), module, torch.randn(1, 4, 5, 5))


def test_a_scale_of_the_other_slices_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fold_scales.output_scaled
    scaled = lambda edit, node, scale, shift: right(edit, node, scale.where(scale != 1, 1.001), shift)  # noqa: E731
    monkeypatch.setattr(fold_scales, "output_scaled", scaled)
    module, x = Attention(2, "tokens"), torch.randn(2, 5, 6)
    assert relative_error(rewritten(FoldScales(), module, x), module, x) > 10 * TOLERANCE
