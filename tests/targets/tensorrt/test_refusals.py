"""Refused nodes, found again in the user's source."""

import re
from pathlib import Path

import onnx_cases
import pytest
import torch
from tensorrt_graphs import needs_rtx
from torch import Tensor, nn

from mobilemix.passes import PASSES
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Lowered
from mobilemix.targets.onnx import OnnxTarget
from mobilemix.targets.tensorrt import builder
from mobilemix.targets.tensorrt.builder import Refusal
from mobilemix.targets.tensorrt.preflight import preflight
from mobilemix.targets.tensorrt.refusals import REMOVED_BY, unsupported


class Gram(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x @ x.transpose(1, 2)) + 1  # the determinant


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, dim=-1).abs().relu()  # the transform


class Block(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x)


def compiled(module: nn.Module, path: Path, *inputs: Tensor) -> Lowered:
    """The ONNX file of a module that no pass has seen."""
    lowered = onnx_cases.lower(module, *(inputs or (torch.ones(2, 4, 4),)))
    OnnxTarget().compile(lowered, Recipe(target="onnx"), path)
    return lowered


def explained(module: nn.Module, path: Path, *inputs: Tensor) -> str:
    lowered = compiled(module, path, *inputs)
    return str(unsupported(preflight(path), path, lowered.program, "TensorRT"))


def test_an_operator_is_named_with_its_line_and_module(tmp_path: Path) -> None:
    message = explained(Block(Gram()), tmp_path / "m.onnx")
    place = r"test_refusals\.py:\d+ \(return torch\.linalg\.det\(.* # the determinant\) in mixer"
    expected = rf"TensorRT does not take Det at \S*{place}: NVIDIA's parser does not have it; no pass removes it, .*"
    assert re.fullmatch(expected, message), message


def test_the_pass_that_removes_it_is_named(tmp_path: Path) -> None:
    message = explained(Block(Spectrum()), tmp_path / "m.onnx")
    assert "does not take DFT at" in message
    assert "# the transform) in mixer" in message
    assert message.endswith("; the pass complex_to_real removes such nodes")


@needs_rtx
def test_so_is_what_nvidia_s_parser_itself_refuses(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    lowered = compiled(Block(Spectrum()), path)
    refusals = builder.parse(path, "tensorrt-rtx")
    message = str(unsupported(refusals, path, lowered.program, "TensorRT for RTX"))
    assert "TensorRT for RTX does not take DFT at" in message
    assert "# the transform) in mixer" in message


def test_the_last_node_computes_an_output_and_no_value_of_its_own_name(tmp_path: Path) -> None:
    class Last(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.det(x)  # the last

    assert "# the last)" in explained(Last(), tmp_path / "m.onnx")


def test_several_places_are_one_line(tmp_path: Path) -> None:
    class Several(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = torch.linalg.det(x)
            second = torch.linalg.det(x + 1)
            third = torch.linalg.det(x + 2)
            levels = x.to(torch.int32) & 3
            return first + second + third + levels.sum((1, 2))

    message = explained(Several(), tmp_path / "m.onnx")
    assert "first = " in message
    assert "second = " in message
    assert "third = " not in message
    assert " and 1 more places: NVIDIA's parser does not have it; nor BitwiseAnd; " in message
    assert "\n" not in message


def test_a_node_that_leads_nowhere_keeps_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    lowered = compiled(Block(Gram()), path)
    message = str(unsupported([Refusal("head/other", "Col2Im", "no")], path, lowered.program, "TensorRT"))
    assert message.startswith("TensorRT does not take Col2Im at module head: no; ")
    message = str(unsupported([Refusal("other", "Col2Im", "no")], path, lowered.program, "TensorRT"))
    assert message.startswith("TensorRT does not take Col2Im, node other: no; ")


def test_a_file_may_be_refused_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    lowered = compiled(Block(Gram()), path)
    message = str(unsupported([Refusal("", "", "too large")], path, lowered.program, "TensorRT"))
    assert message == "TensorRT does not take the file: too large"


@pytest.mark.parametrize("operator", REMOVED_BY)
def test_the_passes_that_it_names_exist(operator: str) -> None:
    assert set(REMOVED_BY[operator].split(" with ")) <= {each.name for each in PASSES}
