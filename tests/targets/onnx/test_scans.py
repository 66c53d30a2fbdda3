from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import pytest
import torch
from torch import Tensor, nn

from mobilemix import ops
from mobilemix.capture import capture
from mobilemix.passes import lower
from mobilemix.recipe import Recipe
from mobilemix.targets.onnx import OnnxTarget, checks, scans

LENGTH, CHANNELS, STATES = 40, 12, 4


class Selective(nn.Module):
    """A scan of inputs whose names its body has too; `ranks` are those of B and C."""

    def __init__(self, ranks: tuple[int, int] = (3, 3), gates: bool = False, last: bool = False):
        super().__init__()
        self.ranks, self.gates, self.last = ranks, gates, last
        self.A = nn.Parameter(-4 * torch.rand(CHANNELS, STATES))
        self.D, self.bias = nn.Parameter(torch.randn(CHANNELS)), nn.Parameter(torch.randn(CHANNELS))

    def forward(self, state: Tensor, step: Tensor, inputs: Tensor, outputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        b, c = (
            matrix if rank == 4 else matrix[:, 0] for matrix, rank in zip((inputs, outputs), self.ranks, strict=True)
        )
        if not self.gates:
            return ops.selective_scan(state, step.abs(), self.A, b, c, return_last_state=self.last)
        return ops.selective_scan(state, step, self.A, b, c, self.D, step, self.bias, True, self.last)


def arguments(batch: int = 1, groups: int = 3, length: int = LENGTH) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    sequences, matrices = (batch, CHANNELS, length), (batch, groups, STATES, length)
    return *(torch.randn(sequences) for _ in range(2)), *(torch.randn(matrices) for _ in range(2))


@pytest.mark.parametrize("ranks", [(3, 3), (4, 4), (3, 4), (4, 3)])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_selective_scan_is_one_node(compiled: Callable[..., Path], ranks: tuple[int, int], batch: int) -> None:
    model = onnx.load(compiled(Selective(ranks), *arguments(batch)))
    assert [node.op_type for node in model.graph.node].count("Scan") == 1


@pytest.mark.parametrize("opset", [18, 21])
def test_gates_and_the_last_state(compiled: Callable[..., Path], opset: int) -> None:
    compiled(Selective(gates=True, last=True), *arguments(), outputs=("y", "state_out"), opset=opset)


@pytest.mark.parametrize("initial", [None, (3, 2), (2,)])
def test_a_linear_scan_is_one_node(compiled: Callable[..., Path], initial: tuple[int, ...] | None) -> None:
    class Module(nn.Module):
        def forward(self, a: Tensor, b: Tensor, start: Tensor | None = None) -> Tensor:
            return ops.linear_scan(torch.sigmoid(a), b, start)

    inputs = torch.randn(9, 3, 2), torch.randn(9, 3, 2)
    path = compiled(Module(), *inputs, *(() if initial is None else (torch.randn(initial),)))
    assert "Scan" in [node.op_type for node in onnx.load(path).graph.node]


class Twice(nn.Module):
    """Two scans, one with rates that the graph computes, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.scans = nn.ModuleList([Selective((4, 4), gates=True), Selective()])
        self.mix = nn.Linear(LENGTH, LENGTH)

    def forward(self, u: Tensor, delta: Tensor, b: Tensor, c: Tensor) -> Tensor:
        first, second = self.scans
        u = self.mix(first(u, delta, b, c))
        return ops.selective_scan(u, delta.abs(), -torch.exp(self.mix(u)[0, :, :STATES]), b, c) + second(u, delta, b, c)


def test_in_float16_files_the_bodies_are_float32(tmp_path: Path) -> None:
    inputs = arguments()
    lowered = onnx_cases.lower(Twice(), *inputs)
    path = tmp_path / "small.onnx"
    recipe = Recipe(target="onnx", precision="fp16")
    OnnxTarget().compile(lowered, recipe, path)
    sample = {name: value.numpy() for name, value in zip(lowered.input_names, inputs, strict=True)}
    found = [*checks.rounding(lowered, recipe, path, [sample]), checks.optimisable(path, "fp16", [sample])]
    assert [check for check in found if not check.passed] == []
    model = onnx.load(path)
    scan_nodes = [node for node in model.graph.node if node.op_type == "Scan"]
    bodies = [item.g for node in scan_nodes for item in node.attribute if item.name == "body"]
    assert len(bodies) == 3
    floats = {value.type.tensor_type.elem_type for body in bodies for value in (*body.input, *body.output)}
    assert floats == {onnx.TensorProto.FLOAT}
    assert onnx.TensorProto.FLOAT16 in {tensor.data_type for tensor in model.graph.initializer}


def test_wide_values_stay_float32_in_float16_files(tmp_path: Path) -> None:
    """A slow decay, which float16 would round to 1."""

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ops.linear_scan(1 - 1e-4 * torch.sigmoid(x), x)

    x = torch.ones(400, 2)
    program = lower(capture(Slow(), (x,)))
    lowered = onnx_cases.Lowered("slow", program, ("x",), ("y",), None, None, None, {})
    OnnxTarget().compile(lowered, Recipe(target="onnx", precision="fp16"), tmp_path / "slow.onnx")
    found = OnnxTarget().load(tmp_path / "slow.onnx").run({"x": x.numpy()})["y"]
    expected = Slow()(x.double()).numpy()
    assert np.abs(found / expected - 1).max() < 2e-3, "0.4 % is what a decay of 1 would add"


def nodes(module: nn.Module, *inputs: Tensor) -> list[str]:
    program = lower(capture(module, inputs), OnnxTarget.passes)
    return [node.target._opname for node in program.graph.nodes if "mobilemix" in str(node.target)]


def test_scans_with_little_to_do_in_a_step_are_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = arguments()
    assert nodes(Selective(), *inputs) == []
    monkeypatch.setattr(scans, "LEAST_STATES", CHANNELS * STATES)
    assert nodes(Selective(), *inputs) == ["selective_scan"]
    assert nodes(Selective((4, 4)), *inputs) == ["selective_scan"]
    assert nodes(Selective(), *arguments(length=scans.LEAST_STEPS - 1)) == []


def test_forms_without_a_translation_are_plain_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "LEAST_STATES", 1)

    class Constant(nn.Module):
        def forward(self, u: Tensor, b: Tensor) -> Tensor:
            return ops.selective_scan(u, u.abs(), -b, b, b)

    class Broadcast(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return ops.linear_scan(a, b)

    assert nodes(Constant(), torch.randn(1, 3, 40), torch.rand(3, 2)) == []
    assert nodes(Broadcast(), torch.rand(40, 1), torch.randn(40, 3)) == []
    assert nodes(Broadcast(), torch.rand(40, 3), torch.randn(40, 3)) == ["linear_scan"]
