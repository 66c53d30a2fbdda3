"""Graphs for every batch: held at each size against the module itself, and against the graph of that size alone."""

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from mobilemix import ops
from mobilemix.errors import BatchError
from mobilemix.parity import relative_l2
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Lowered
from mobilemix.targets.onnx import OnnxTarget
from mobilemix.targets.onnx.batch import generalise

SIZES = (1, 4, 5, 9)
"""None of which a graph was made for, and the smallest of which is no axis to many operators."""

HALF = 2e-2
"""Relative L2 of float16 arithmetic."""


class Small(nn.Module):
    """One function of a few weights."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.linear, self.gru = nn.Linear(8, 8), nn.GRU(8, 8, batch_first=True)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.factors = nn.Parameter(torch.randn(4))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def lower(module: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]], pair: tuple[int, int] = (2, 3)) -> Lowered:
    one, two = (onnx_cases.lower(module, *inputs(batch)) for batch in pair)
    return dataclasses.replace(one, larger=two.program, dynamic_batch=(1, 4, 9))


def assert_right_for_every_batch(
    module: nn.Module, inputs: Callable[[int], tuple[Tensor, ...]], folder: Path, precision: str = "fp32"
) -> onnx.ModelProto:
    """Hold the file against the module, and against the file of each batch alone; returns it."""
    lowered, path = lower(module, inputs), folder / "small.onnx"
    tolerance = HALF if precision == "fp16" else onnx_cases.ROUNDING
    recipe = Recipe(target="onnx", precision=precision)
    OnnxTarget().compile(lowered, recipe, path)
    runner = OnnxTarget().load(path)
    for size in SIZES:
        values = inputs(size)
        sample = {name: value.numpy() for name, value in zip(lowered.input_names, values, strict=True)}
        (answer,) = runner.run(sample).values()
        (expected,) = onnx_cases.expected(module, *values)
        assert answer.shape == expected.shape
        assert relative_l2(answer, expected) < tolerance
    OnnxTarget().compile(onnx_cases.lower(module, *values), recipe, folder / "fixed.onnx")
    (fixed,) = OnnxTarget().load(folder / "fixed.onnx").run(sample).values()
    assert relative_l2(answer, fixed) < tolerance
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        first, *others = value.type.tensor_type.shape.dim
        assert first.dim_param == "batch"
        assert all(each.dim_value for each in others)
    return model


def tokens(batch: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(batch)),)


def operators(model: onnx.ModelProto) -> collections.Counter[str]:
    return collections.Counter(node.op_type for node in model.graph.node)


DEPENDENT: dict[str, tuple[Callable[..., Tensor], set[str]]] = {
    "a shape": (lambda m, x: m.linear(x).view(len(x), 5, 2, 4).transpose(1, 2).flatten(1), {"Reshape"}),
    "rows that broadcast": (lambda m, x: x + m.positions.expand(len(x), -1, -1) * torch.ones(len(x), 5, 8), set()),
    "rows in a concatenation": (lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), m.linear(x)], 1), {"Expand"}),
    "rows in a product": (lambda m, x: torch.bmm(m.positions.expand(len(x), -1, -1), x.transpose(1, 2)), {"Expand"}),
    "zeros": (lambda m, x: torch.cat([x.new_zeros(len(x), 2, 8), x], 1), {"Expand"}),
    "a computed expansion": (lambda m, x: torch.cat([x, m.linear(x[:, :1, :1].expand(-1, 2, 8))], 1), {"Expand"}),
    "a first state": (lambda m, x: m.gru(x)[0], {"GRU"}),
    "sizes of parts": (lambda m, x: sum(m.linear(torch.cat([x, x.flip(1)])).chunk(2)), {"Split", "Shape"}),
    "the end of a slice": (lambda m, x: m.linear(torch.cat([x, x.flip(1)]))[: len(x)].sin(), {"Slice", "Shape"}),
    "batch indices": (lambda m, x: m.linear(x)[torch.arange(len(x)), x[:, :, 0].argmax(1)], {"Range"}),
    "rows of a table": (
        lambda m, x: m.linear(x).reshape(-1, 8)[torch.arange(len(x))[:, None] * 5 + torch.tensor([0, 3])],
        {"Range"},
    ),
}
"""What of a graph depends on the batch, and how the graph of every batch may say it."""


@pytest.mark.parametrize("name", DEPENDENT)
def test_what_depends_on_the_batch_follows_from_it(name: str, tmp_path: Path) -> None:
    function, wanted = DEPENDENT[name]
    found = operators(assert_right_for_every_batch(Small(function), tokens, tmp_path))
    assert wanted <= set(found)
    if not wanted & {"Expand", "Range", "Shape", "GRU"}:
        assert "Shape" not in found, "sizes that follow by themselves need not be computed"


@pytest.mark.parametrize("name", ["a shape", "rows in a concatenation", "batch indices"])
def test_float16_graphs_too(name: str, tmp_path: Path) -> None:
    assert_right_for_every_batch(Small(DEPENDENT[name][0]), tokens, tmp_path, "fp16")


def test_the_graph_is_that_of_one_batch_but_for_shapes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = onnx_cases.SmallBackbone()
    model = assert_right_for_every_batch(module, lambda batch: (torch.rand(batch, 3, 16, 16),), tmp_path)
    OnnxTarget().compile(onnx_cases.lower(module, torch.rand(2, 3, 16, 16)), Recipe(target="onnx"), tmp_path / "2.onnx")
    fixed = onnx.load(tmp_path / "2.onnx")
    assert [node.op_type for node in model.graph.node] == [node.op_type for node in fixed.graph.node]
    shapes = [value.type.tensor_type.shape.dim for value in model.graph.value_info]
    assert all(dim.dim_value or "batch" in dim.dim_param for shape in shapes for dim in shape)


def test_several_inputs_of_which_one_has_no_batch(tmp_path: Path) -> None:
    def attend(m: Small, x: Tensor, gate: Tensor, mask: Tensor) -> Tensor:
        return (x @ x.transpose(1, 2) + mask).softmax(-1) @ x * gate[:, None]

    def inputs(batch: int) -> tuple[Tensor, ...]:
        return *tokens(batch), torch.rand(batch, 8), torch.ones(5, 5).tril()

    lowered = lower(Small(attend), inputs)
    OnnxTarget().compile(lowered, Recipe(target="onnx"), tmp_path / "small.onnx")
    shapes = [value.type.tensor_type.shape.dim for value in onnx.load(tmp_path / "small.onnx").graph.input]
    assert [shape[0].dim_param or shape[0].dim_value for shape in shapes] == ["batch", "batch", 5]
    for size in SIZES:
        sample = {name: value.numpy() for name, value in zip(lowered.input_names, inputs(size), strict=True)}
        (answer,) = OnnxTarget().load(tmp_path / "small.onnx").run(sample).values()
        (expected,) = onnx_cases.expected(Small(attend), *map(torch.from_numpy, sample.values()))
        assert relative_l2(answer, expected) < onnx_cases.ROUNDING


def test_a_scan_whose_state_has_the_batch(tmp_path: Path) -> None:
    def inputs(batch: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(batch)
        return tuple(
            torch.randn(batch, *shape, generator=generator) for shape in ((12, 40), (12, 40), (4, 40), (4, 40))
        )

    class Selective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.A = nn.Parameter(-torch.rand(12, 4))

        def forward(self, u: Tensor, delta: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return ops.selective_scan(u, delta.abs(), self.A, b, c)

    torch.manual_seed(0)
    model = assert_right_for_every_batch(Selective(), inputs, tmp_path)
    (scan,) = (node for node in model.graph.node if node.op_type == "Scan")
    (body,) = (attribute.g for attribute in scan.attribute if attribute.name == "body")
    sizes = {dim.dim_param for value in (*body.input, *body.output) for dim in value.type.tensor_type.shape.dim}
    assert "batch" in sizes


def _of_number(m: Small, x: Tensor) -> Tensor:
    return x * len(x)


def _of_samples(m: Small, x: Tensor) -> Tensor:
    return torch.stack([m.linear(one) for one in x])


def _of_operators(m: Small, x: Tensor) -> Tensor:
    return m.linear(x).relu() if len(x) > 2 else m.linear(x).sigmoid()


def _of_attributes(m: Small, x: Tensor) -> Tensor:
    return F.leaky_relu(m.linear(x), 1 / len(x))


def _of_wiring(m: Small, x: Tensor) -> Tensor:
    y, z = m.linear(x), m.linear(x + 1)
    return y - z if len(x) > 2 else z - y


def _of_weights(m: Small, x: Tensor) -> Tensor:
    return x + torch.linspace(0, 1, len(x))[:, None, None]


def _of_sizes(m: Small, x: Tensor) -> Tensor:
    return m.linear(x).flatten(1)[:, : 8 * len(x) - 8]


@pytest.mark.parametrize(
    "function", [_of_number, _of_samples, _of_operators, _of_attributes, _of_wiring, _of_weights, _of_sizes]
)
def test_another_difference_is_refused_with_its_line(function: Callable[..., Tensor], tmp_path: Path) -> None:
    with pytest.raises(BatchError) as caught:
        OnnxTarget().compile(lower(Small(function), tokens), Recipe(target="onnx"), tmp_path / "small.onnx")
    message = str(caught.value)
    assert message.startswith("the graph for a batch of 3 differs from that for 2 by more than the size: ")
    assert "test_batch.py:" in message
    assert message.endswith("; leave out --dynamic-batch")
    assert not (tmp_path / "small.onnx").exists()


def _generalised(contents: Callable[[int], np.ndarray]) -> Callable[[int], np.ndarray]:
    """What a graph of every batch has in a constant's place."""
    graphs = []
    for batch in (2, 3):
        x, content = ir.val("x", ir.DataType.FLOAT, (batch, 4)), contents(batch)
        dtype = ir.DataType.from_numpy(content.dtype)
        constant = ir.val("c", dtype, content.shape, const_value=ir.tensor(content, name="c"))
        node = ir.node("Identity", [constant])
        (y,) = node.outputs
        y.name, y.dtype, y.shape = "y", dtype, ir.Shape(content.shape)
        graph = ir.Graph([x], [y], nodes=[node], initializers=[constant], opset_imports={"": 18}, name="small")
        graphs.append(ir.Model(graph, ir_version=8))
    generalise(*graphs, {})
    proto = ir.to_proto(graphs[0])
    onnx.checker.check_model(proto, full_check=True)
    evaluator = ReferenceEvaluator(proto)
    return lambda batch: evaluator.run(None, {"x": np.zeros((batch, 4), np.float32)})[0]


ROW = np.array([3.5, -np.inf, 2], np.float32)


@pytest.mark.parametrize(
    "contents",
    [
        pytest.param(lambda n: np.broadcast_to(ROW, (n, 3)).copy(), id="rows"),
        pytest.param(lambda n: np.broadcast_to(ROW[:, None], (2, 3, n)).copy(), id="last axis"),
        pytest.param(lambda n: np.ones((n, 1), bool), id="flags"),
        pytest.param(lambda n: np.tile(ROW, n), id="outer part of an axis"),
        pytest.param(lambda n: np.repeat(ROW, n), id="inner part of an axis"),
        pytest.param(lambda n: np.tile(ROW[:, None], (2, n, 5)), id="part of an axis between others"),
        pytest.param(lambda n: np.arange(n), id="indices"),
        pytest.param(lambda n: np.arange(n, dtype=np.int32)[:, None] * 7 + np.arange(4, dtype=np.int32), id="offsets"),
        pytest.param(lambda n: (np.arange(n)[:, None] * -5 + np.array([0, 3])).ravel(), id="flat offsets"),
        pytest.param(lambda n: (np.arange(n) * 2 + np.array([[1], [8]])).ravel(), id="flat offsets, inner"),
        pytest.param(lambda n: np.array([n, 7, 3 * n, -1]), id="sizes"),
    ],
)
def test_constants_of_two_batches_tell_those_of_every_batch(contents: Callable[[int], np.ndarray]) -> None:
    constant = _generalised(contents)
    for batch in (1, *SIZES):
        found, expected = constant(batch), contents(batch)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "contents",
    [
        pytest.param(lambda n: np.linspace(0, 1, n), id="numbers of each sample"),
        pytest.param(lambda n: np.arange(n) ** 2, id="uneven steps"),
        pytest.param(lambda n: np.array(n), id="the number of samples"),
        pytest.param(lambda n: np.array([1.0, n], np.float32), id="a float of the number of samples"),
        pytest.param(lambda n: np.array([n + 1, 4]), id="a size with something added"),
        pytest.param(lambda n: np.array([n * n, 4]), id="a square"),
        pytest.param(lambda n: np.ones((n, n)), id="two axes"),
        pytest.param(lambda n: np.ones(n + 1), id="an axis with something added"),
        pytest.param(lambda n: np.ones([1] * n), id="ranks"),
        pytest.param(lambda n: np.ones(2, [np.int32, np.int64][n % 2]), id="dtypes"),
    ],
)
def test_other_constants_are_refused(contents: Callable[[int], np.ndarray]) -> None:
    with pytest.raises(BatchError, match="more than the size: Identity at node"):
        _generalised(contents)
