from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemix.targets.onnx import rewrites

Operators = Callable[..., list[str]]


class Function(nn.Module):
    """A function of one tensor, and the modules that it calls."""

    def __init__(self, function: Callable[[Tensor], Tensor | tuple[Tensor, ...]], *parts: nn.Module):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(x)


def optimised_operators(path: Path) -> list[str]:
    """What ONNX Runtime makes of a file."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimised.onnx"))
    options.log_severity_level = 4
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def test_gelu_is_one_kernel_in_onnx_runtime(compiled: Callable[..., Path]) -> None:
    path = compiled(Function(F.gelu), torch.randn(1, 4, 8, 8))
    assert optimised_operators(path) == ["Gelu"]


def test_tanh_gelu_is_left_alone(operators: Operators) -> None:
    assert "Erf" not in operators(Function(lambda x: F.gelu(x, approximate="tanh")), torch.randn(1, 4, 8, 8))


@pytest.mark.parametrize("keepdim", [True, False])
def test_spatial_mean_is_a_pool_where_the_axes_stay(operators: Operators, keepdim: bool) -> None:
    found = operators(Function(lambda x: x.mean((2, 3), keepdim=keepdim)), torch.randn(1, 4, 5, 6))
    assert found == ["GlobalAveragePool" if keepdim else "ReduceMean"]


def test_mean_over_other_axes_is_left_alone(operators: Operators) -> None:
    assert operators(Function(lambda x: x.mean((1, 2), keepdim=True)), torch.randn(1, 4, 5, 6)) == ["ReduceMean"]


@pytest.mark.parametrize("shape", [(1, 6, 5, 7), (2, 6, 9), (1, 6, 2, 3, 4)])
def test_channel_norm_is_one_layer_normalization(operators: Operators, shape: tuple[int, ...]) -> None:
    norm = onnx_cases.randomise(onnx_cases.ChannelNorm(6, len(shape)))
    assert operators(norm, 3 * torch.randn(shape) + 1) == ["LayerNormalization", "Transpose", "Transpose"]


def test_channel_norm_before_other_arithmetic_keeps_it(operators: Operators) -> None:
    """Only constants that vary by channel alone are part of a norm."""
    norm, plane = onnx_cases.ChannelNorm(6), torch.randn(1, 1, 5, 7)
    found = operators(Function(lambda x: norm(x) * plane.to(x), norm), torch.randn(1, 6, 5, 7))
    assert found == ["LayerNormalization", "Mul", "Transpose", "Transpose"]


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_conv_that_is_only_split_becomes_one_for_each_part(operators: Operators, parts: int) -> None:
    conv = nn.Conv2d(6, 4 * parts, 3, padding=1, stride=2)
    found = operators(
        Function(lambda x: conv(x).chunk(parts, 1), conv),
        torch.randn(1, 6, 8, 8),
        outputs=[f"part{n}" for n in range(parts)],
    )
    assert found == ["Conv"] * parts


@pytest.mark.parametrize(
    ("conv", "function"),
    [
        (nn.Conv2d(6, 12, 1, groups=2), lambda y: y.chunk(2, 1)),
        (nn.Conv2d(6, 12, 1), lambda y: (*y.chunk(2, 1), y.relu())),
        (nn.Conv2d(6, 12, 1), lambda y: y.chunk(2, 2)),
    ],
    ids=["grouped", "read elsewhere", "split in height"],
)
def test_conv_stays_whole(
    operators: Operators, conv: nn.Module, function: Callable[[Tensor], tuple[Tensor, ...]]
) -> None:
    x = torch.randn(1, 6, 4, 4)
    outputs = [f"output{index}" for index in range(len(function(conv(x))))]
    found = operators(Function(lambda x: function(conv(x)), conv), x, outputs=outputs)
    assert found.count("Conv") == 1
    assert found.count("Split") == 1


def test_equal_constants_and_equal_nodes_occur_once() -> None:
    def constant(name: str) -> ir.Value:
        return ir.Value(
            name=name,
            const_value=ir.tensor(np.full(4, 2.0, np.float32), name=name),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape([4]),
        )

    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([4]))
    one, other = constant("one"), constant("other")
    products = [ir.node("Mul", [x, factor]) for factor in (one, other)]
    total = ir.node("Add", [node.outputs[0] for node in products])
    graph = ir.Graph([x], total.outputs, nodes=[*products, total], initializers=[one, other], opset_imports={"": 18})
    model = ir.Model(graph, ir_version=8)
    rewrites.rewrite(model)
    assert [node.op_type for node in model.graph] == ["Mul", "Add"]
    assert len(model.graph.initializers) == 1
