import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mobilemix.errors import TargetError, UnsupportedOpError
from mobilemix.targets.onnx.translate import translate
from mobilemix.targets.onnx.translations import _cell_weights


def value_names(module: nn.Module, *inputs: Tensor) -> tuple[set[str], set[str]]:
    """Names of the program's computed nodes, and of the values of its translation."""
    lowered = onnx_cases.lower(module, *inputs, outputs=["out"])
    program = {node.name for node in lowered.program.graph.nodes if node.op == "call_function"}
    model = translate(lowered, 18).model
    return program, {str(value.name) for node in model.graph for value in node.outputs}


def test_values_keep_the_names_of_the_programs_nodes() -> None:
    program, values = value_names(onnx_cases.SmallBackbone(), torch.randn(1, 3, 16, 16))
    # Of a split only the parts are values; the last node is the output, which has the lowered model's name.
    lost = {name for name in program - values if not name.startswith("chunk")}
    assert lost == {"linear_2"}


class InPlaceAndDecomposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        parts = F.hardshrink(x, 0.1).relu_().movedim(1, 2).tensor_split(2, 1)
        return F.hardshrink(parts[0], 0.2) + F.softshrink(parts[1], 0.1)


def test_names_survive_decomposition() -> None:
    program, values = value_names(InPlaceAndDecomposed(), torch.randn(1, 4, 6, 5))
    assert {"hardshrink", "hardshrink_1", "softshrink"} <= program & values


def test_decomposed_parts_do_not_take_the_names_of_others() -> None:
    """What a decomposition computes on the way stands under the name of what it is for."""
    program, values = value_names(InPlaceAndDecomposed(), torch.randn(1, 4, 6, 5))
    inside = {name for name in values - program if not name.startswith(("val_", "out"))}
    assert inside
    assert all(name.split(".")[0] in program for name in inside if "scalar_tensor" not in name)


def test_program_is_left_as_it_was() -> None:
    lowered = onnx_cases.lower(InPlaceAndDecomposed(), torch.randn(1, 4, 6, 5))
    before = str(lowered.program.graph)
    translate(lowered, 18)
    assert str(lowered.program.graph) == before


@pytest.mark.parametrize("sizes", [(1, 1), (2, 3), (3, 4), (5, 2)], ids=str)
def test_adaptive_mean_of_any_grid(compiled: Callable[..., Path], sizes: tuple[int, int]) -> None:
    compiled(nn.AdaptiveAvgPool2d(sizes), torch.randn(2, 3, 6, 7))


@given(size=st.integers(1, 40), count=st.integers(1, 40))
def test_weights_of_an_adaptive_mean(size: int, count: int) -> None:
    x = np.random.default_rng(0).standard_normal((1, size)).astype(np.float32)
    expected = F.adaptive_avg_pool1d(torch.from_numpy(x), count).numpy()
    np.testing.assert_allclose(x @ _cell_weights(size, count).T, expected, atol=1e-5)


class Parts(nn.Module):
    """Unequal splits, a chunk with a remainder, and reshapes with an inferred size."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, second = x.split([1, 6], 1)
        *chunks, last = second.chunk(4, 1)
        return first.reshape(-1, 2).flatten(), chunks[0].unflatten(-1, (-1, 3)), last, *x.split(7, 1), 2 - x.square()


def test_parts_and_shapes(compiled: Callable[..., Path]) -> None:
    compiled(Parts(), torch.randn(2, 7, 6), outputs=["first", "chunk", "last", "whole", "rest"])


class Norms(nn.Module):
    def __init__(self, affine: bool):
        super().__init__()
        self.layers = nn.Sequential(
            nn.AvgPool2d(2), nn.BatchNorm2d(6, affine=affine), nn.ReLU(), nn.GroupNorm(3, 6, affine=affine)
        )
        onnx_cases.randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("affine", [True, False])
def test_norms_with_and_without_parameters(compiled: Callable[..., Path], affine: bool) -> None:
    compiled(Norms(affine), torch.randn(2, 6, 8, 8))


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x) + 1


def test_missing_operator_is_named_with_its_place() -> None:
    with pytest.raises(UnsupportedOpError, match=r"bessel_j0.*test_translate\.py:\d+ \(return torch.special"):
        translate(onnx_cases.lower(Bessel(), torch.randn(3)), 18)


def test_failing_translation_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Sequence[object]:
        raise ValueError("no such luck\nand more")

    monkeypatch.setattr("mobilemix.targets.onnx.translate.TRANSLATIONS", {torch.ops.aten.relu.default: fail})
    with pytest.raises(TargetError, match=r"aten\.relu.*: no such luck$"):
        translate(onnx_cases.lower(nn.ReLU(), torch.randn(3)), 18)


def test_says_nothing(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger("torch.onnx").level
    translate(onnx_cases.lower(nn.ReLU(), torch.randn(3)), 18)
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert logging.getLogger("torch.onnx").level == level


def test_inputs_that_are_not_read_stay(compiled: Callable[..., Path]) -> None:
    class First(nn.Module):
        def forward(self, used: Tensor, unused: Tensor) -> Tensor:
            return used.relu()

    path = compiled(First(), torch.randn(2, 3), torch.randn(4))
    assert [value.name for value in onnx.load(path).graph.input] == ["used", "unused"]


class Clash(nn.Module):
    """A buffer and a node that are called what an input and an output are called, an output that is an input, and a
    value that is two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x", torch.tensor([2.0, 3.0]))

    def forward(self, y: Tensor) -> tuple[Tensor, ...]:
        relu = y.relu()
        total = relu + self.x
        return total, relu.sigmoid(), y, total


def test_interface_has_the_lowered_models_names(compiled: Callable[..., Path]) -> None:
    graph = onnx.load(compiled(Clash(), torch.randn(2), outputs=["relu", "add", "copy", "again"])).graph
    assert [value.name for value in graph.input] == ["y"]
    assert [value.name for value in graph.output] == ["relu", "add", "copy", "again"]
