import dataclasses
import glob
from pathlib import Path

import numpy as np
import onnx_cases
import onnx_ir as ir
import pytest
import torch
from torch import nn

from mobilemix.errors import UnknownNameError
from mobilemix.quantization.data import GIVEN
from mobilemix.quantization.options import FLOAT, Quantization
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Lowered
from mobilemix.targets.onnx import OnnxTarget
from mobilemix.targets.onnx.candidates import Candidates
from mobilemix.targets.onnx.quantize import place

SAMPLES = [{"input": np.random.default_rng(seed).standard_normal((1, 3, 16, 16), np.float32)} for seed in range(4)]
OPSET = 21


@pytest.fixture(scope="module")
def lowered() -> Lowered:
    torch.manual_seed(0)
    module = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 64, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 4)),
    )
    return onnx_cases.lower(module, torch.zeros(1, 3, 16, 16), calibration=tuple(SAMPLES))


def recipe(precision: str, **options: object) -> Recipe:
    return Recipe(target="onnx", precision=precision, opset=OPSET, quantization=Quantization(data=GIVEN, **options))


def compiled(lowered: Lowered, asked: Recipe, kept: list[str], path: Path) -> Path:
    layers = tuple((glob.escape(name), FLOAT) for name in kept)
    options = dataclasses.replace(asked.quantization, layers=layers)
    OnnxTarget().compile(lowered, dataclasses.replace(asked, quantization=options), path)
    return path


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic", "w8", "w4"])
def test_a_candidate_answers_as_the_file_of_its_recipe(lowered, tmp_path, precision):
    asked = recipe(precision, bias_correction=precision == "int8")
    candidates = Candidates(lowered, asked, tmp_path)
    names = [layer.name for layer in candidates.layers]
    assert len(names) > 2
    (tmp_path / "out").mkdir()
    answers = []
    for kept in ([], names[::2]):
        path = compiled(lowered, asked, kept, tmp_path / "out" / "small.onnx")
        run = candidates.runner(kept)
        for sample in SAMPLES:
            np.testing.assert_allclose(run(sample)["logits"], OnnxTarget().load(path).run(sample)["logits"], atol=1e-6)
        answers.append(run(SAMPLES[0])["logits"])
    reference = candidates.reference()(SAMPLES[0])["logits"]
    assert not np.allclose(answers[0], reference, atol=1e-6)
    assert not np.allclose(*answers, atol=1e-6)


def test_layers_say_what_they_cost(lowered, tmp_path):
    layers = {layer.module: layer for layer in Candidates(lowered, recipe("w8"), tmp_path).layers}
    conv, linear = layers["2"], layers["9"]
    assert conv.name == f"2/{conv.output}"
    assert (conv.multiply_adds, conv.weight_bytes) == (32 * 32 * 9 * 64, 4 * 32 * 32 * 9)
    assert (linear.multiply_adds, linear.weight_bytes) == (64 * 48, 4 * 64 * 48)
    assert all(layer.seconds is not None and layer.seconds > 0 for layer in layers.values())


def test_watched_values_are_returned_besides_the_outputs(lowered, tmp_path):
    candidates = Candidates(lowered, recipe("int8"), tmp_path)
    first = candidates.layers[0]
    names = [layer.name for layer in candidates.layers if layer is not first]
    found = candidates.runner(names, [first.output])(SAMPLES[0])
    expected = candidates.reference([first.output])(SAMPLES[0])
    assert list(found) == list(expected) == ["logits", first.output]
    error = np.abs(found[first.output] - expected[first.output]).max()
    assert 0 < error < 0.05 * np.abs(expected[first.output]).max()


def test_every_choice_reads_ranges_that_were_observed(lowered, tmp_path):
    candidates = Candidates(lowered, recipe("int8"), tmp_path)
    graph = ir.load(tmp_path / "small.onnx").graph
    observed, names = place(graph).observed, {layer.name for layer in candidates.layers}
    for name in names:
        assert place(graph, {name}).observed <= observed
        assert place(graph, names - {name}).observed <= observed


def test_what_the_user_left_in_float_is_no_layer(lowered, tmp_path):
    names = [layer.module for layer in Candidates(lowered, recipe("int8", layers=(("2", FLOAT),)), tmp_path).layers]
    assert "2" not in names
    assert "9" in names


def test_precisions_that_quantise_nothing(lowered, tmp_path):
    with pytest.raises(UnknownNameError, match="Valid: int8, int8-dynamic, w4, w8"):
        Candidates(lowered, recipe("fp16"), tmp_path)
