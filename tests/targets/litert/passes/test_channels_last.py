from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram, export

from mobilemix.targets.litert.passes.channels_last import ChannelsLast
from mobilemix.targets.litert.passes.views import materialize, plain, refine

RELATIVE = 1e-9  # float64: only the order of sums differs


def _lowered(model: nn.Module, *inputs: Tensor) -> tuple[ExportedProgram, Counter[str]]:
    """The program after the pass, checked against the model, and its operators."""
    result = ChannelsLast()(export(model.eval(), inputs))
    assert result.modified
    expected, found = model(*inputs), result.program.module()(*inputs)
    torch.testing.assert_close(found, expected, rtol=RELATIVE, atol=RELATIVE)
    calls = [
        getattr(node.target, "_opname", "item") for node in result.program.graph.nodes if node.op == "call_function"
    ]
    return result.program, Counter(calls)


def _image(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _free(counts: Counter[str], images: int) -> int:
    """Permutations beside the two of each convolution or pool."""
    return counts["permute"] + counts["transpose"] - 2 * images


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1).double(), nn.Conv2d(6, 6, 1).double()
        self.scale = nn.Parameter(torch.rand(6, 1, 1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.a(x))
        gate = torch.sigmoid(y.mean((2, 3), keepdim=True))
        return torch.cat([y + self.scale * self.b(y * gate), y], 1).mean((2, 3))


class _Tokens(nn.Module):
    """Convolution, attention of two heads over positions, convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(4, 24, 1).double(), nn.Conv2d(8, 4, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 6, 4, h * w).chunk(3, 1)
        weights = torch.softmax(q.transpose(-1, -2) @ k, -1)
        return self.out((v @ weights.transpose(-1, -2)).reshape(b, 8, h, w))


class _Rows(nn.Module):
    """A linear map of rows and one of columns, as in a Fourier transform, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1).double(), nn.Conv2d(16, 3, 1).double()
        self.width, self.height = nn.Linear(6, 10, bias=False).double(), nn.Linear(5, 7).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.width(self.a(x))
        return self.b(self.height(y.transpose(2, 3)).transpose(2, 3))


class _Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1).double(), nn.Conv1d(6, 9, 1).double()
        self.norm = nn.GroupNorm(1, 6).double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.a(x)).flatten(2)
        a, b, c = self.b(tokens).chunk(3, 1)
        state = tokens @ (torch.softmax(a, -1) * b).transpose(1, 2)
        return (state @ c).reshape(x.shape[0], 6, *x.shape[2:])


class _Windows(nn.Module):
    """Operators with and without rules, and reshapes that split, merge and reorder axes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.inner = nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.BatchNorm2d(8)
        self.up, self.mix, self.map = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv1d(8, 8, 3, padding=1), nn.Linear(8, 8)
        self.double()
        self.inner.running_mean.fill_(0.3)  # type: ignore[union-attr, operator]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        b = x.shape[0]
        x = self.norm(self.stem(x))
        x = torch.cat([x, self.up(x)[:, :, ::2, ::2]], 1).chunk(2, 1)[1] * x
        x = self.inner(F.pad(F.avg_pool2d(F.interpolate(x, scale_factor=2.0), 2), (1, 0, 0, 1)))[..., 1:, :-1]
        windows = x.reshape(b, 8, 2, 4, 2, 4).permute(0, 2, 4, 3, 5, 1).reshape(b * 4, 16, 8)
        windows = self.map(windows) + windows.mean(1, keepdim=True)
        x = windows.reshape(b, 2, 2, 4, 4, 8).permute(0, 5, 1, 3, 2, 4).reshape(b, 8, 8, 8)
        tokens = self.mix(x.flatten(2)).transpose(1, 2)
        return tokens.amax(1), torch.einsum("bchw,bdhw->bcd", x, x), x.mean(1).sum(-1)


@pytest.mark.parametrize("batch", [1, 2])
def test_windows(batch: int) -> None:
    _lowered(_Windows(), _image(batch, 3, 16, 16))


def test_gates_residuals_and_concatenations_copy_nothing() -> None:
    _, counts = _lowered(_Residual(), _image(1, 3, 8, 8))
    assert _free(counts, images=2) == 1  # the input
    assert counts["reshape"] <= 1


def test_attention_copies_operands_by_head_only() -> None:
    _, counts = _lowered(_Tokens(), _image(1, 4, 4, 5))
    assert counts["bmm"] == 2
    # Input and output, three operands and the result by head, and what is a flag of the product.
    assert _free(counts, images=2) == 2 + 3 + 1 + 1


def test_transforms_of_rows_and_columns_multiply_from_the_left() -> None:
    program, counts = _lowered(_Rows(), _image(1, 3, 5, 6))
    assert counts["bmm"] == 2
    assert not counts["linear"]
    assert _free(counts, images=2) <= 2  # input and output
    assert any(spec.target and spec.target.endswith("_left") for spec in program.graph_signature.input_specs)


def test_pointwise_convolutions_of_tokens_are_linear_maps() -> None:
    _, counts = _lowered(_Sequence(), _image(1, 3, 4, 4))
    assert counts["linear"] == 1
    assert not counts["conv1d"]
    assert not counts["group_norm"]


def test_batch_of_more_than_one() -> None:
    _lowered(_Tokens(), _image(3, 4, 4, 5))
    _lowered(_Rows(), _image(2, 3, 5, 6))


def test_a_program_without_images_stays() -> None:
    program = export(nn.Linear(3, 4), (torch.rand(2, 3),))
    assert ChannelsLast()(program).program is program


@pytest.mark.parametrize("operator", [torch.cumsum, torch.flip])
def test_what_has_no_rule_gets_its_value_as_it_is(operator) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 4, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return (operator(y, 1) if operator is torch.cumsum else operator(y, [1])) + y

    _lowered(Model(), _image(1, 3, 4, 5))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_reshapes_and_permutations_are_views(data: st.DataObject) -> None:
    """Whatever chain of them: the value that is materialized is theirs."""
    from mobilemix.passes.editing import Edit

    shape = data.draw(st.sampled_from([(2, 6, 4), (1, 12, 2, 2), (4, 1, 6), (8, 9)]))
    program = export(nn.ReLU(), (torch.rand(*shape),))
    edit = Edit(program)
    (relu,) = edit.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    value = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    expected, view = value, plain(relu)
    for _ in range(data.draw(st.integers(1, 5))):
        if data.draw(st.booleans()):
            order = data.draw(st.permutations(range(expected.dim())))
            expected, view = expected.permute(order), view.permuted(order)
            continue
        size = expected.numel()
        first = data.draw(st.sampled_from([each for each in range(1, size + 1) if size % each == 0]))
        reshaped = view.reshaped((first, size // first))
        if reshaped is not None:
            expected, view = expected.reshape(first, size // first), reshaped
    assert view.shape == tuple(expected.shape)
    (output,) = edit.graph.find_nodes(op="output")
    with edit.at(output):
        node = materialize(edit, view)
    result = torch.fx.GraphModule(torch.nn.Module(), _returning(edit.graph, node))(value)
    assert torch.equal(result, expected)


def _returning(graph: torch.fx.Graph, node: torch.fx.Node) -> torch.fx.Graph:
    (output,) = graph.find_nodes(op="output")
    output.args = (node,)
    return graph


def test_refinements() -> None:
    assert refine([6, 4], [24]) == [6, 4]
    assert refine([4, 6], [8, 3]) == [4, 2, 3]
    assert refine([6], [2, 3]) == [2, 3]
    assert refine([2, 3], [3, 2]) is None
