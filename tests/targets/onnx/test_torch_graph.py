from pathlib import Path

import numpy as np
import onnx
import onnx_cases
import pytest
import torch
from models_checks import distinct
from safetensors.torch import save_file
from torch import nn

import mobilemix
from mobilemix.errors import InputError
from mobilemix.models.registry import MODELS, build
from mobilemix.parity import noise, relative_l2
from mobilemix.recipe import Recipe
from mobilemix.signature import inputs_of
from mobilemix.targets.onnx import OnnxTarget
from mobilemix.targets.onnx.runtime import OnnxRunner
from mobilemix.targets.onnx.torch_graph import simulate

ROUNDING = 1e-5
"""Relative L2 between ONNX Runtime in float32 and PyTorch in float64."""

SAMPLE = {"image": np.random.default_rng(0).standard_normal((1, 3, 16, 16), np.float32)}


class Recurrence(nn.Module):
    """A scan whose state is large enough to be one `Scan` node."""

    def forward(self, decay: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.ops.mobilemix.linear_scan(decay.sigmoid(), value, None)


def test_outputs_are_those_of_onnx_runtime(backbone: Path) -> None:
    expected = OnnxRunner(backbone, optimised=False).run(SAMPLE)
    found = simulate(backbone).run(SAMPLE)
    assert list(found) == list(expected) == ["logits"]
    assert found["logits"].dtype == np.float32
    assert relative_l2(found["logits"], expected["logits"]) < ROUNDING


def test_so_is_every_value_and_its_name(backbone: Path) -> None:
    expected = dict(OnnxRunner(backbone).values(SAMPLE))
    found = dict(simulate(backbone).values(SAMPLE))
    assert list(found) == list(expected)
    assert len(found) > 20
    for name, value in found.items():
        assert relative_l2(value, expected[name]) < ROUNDING, name


def test_a_given_value_is_read_in_place_of_the_computed_one(backbone: Path) -> None:
    simulation = simulate(backbone)
    name, value = next((name, value) for name, value in simulation.values(SAMPLE) if value.ndim == 4)
    outputs, kept = simulation.follow(SAMPLE, {name: np.zeros_like(value)}, [name])
    assert relative_l2(kept[name], value) < ROUNDING
    assert relative_l2(outputs["logits"], simulation.run(SAMPLE)["logits"]) > 0.01


def test_scans(tmp_path: Path) -> None:
    path = tmp_path / "scan.onnx"
    lowered = onnx_cases.lower(Recurrence(), torch.randn(40, 2048), torch.randn(40, 2048), outputs=("states",))
    OnnxTarget().compile(lowered, Recipe(target="onnx"), path)
    assert "Scan" in OnnxTarget().op_histogram(path)
    (sample,) = noise(inputs_of(lowered.program), 1)
    assert relative_l2(simulate(path).run(sample)["states"], OnnxRunner(path).run(sample)["states"]) < ROUNDING


def test_weights_beside_the_file(backbone: Path) -> None:
    expected = simulate(backbone).run(SAMPLE)
    model = onnx.load(backbone)
    onnx.save(model, backbone, save_as_external_data=True, location="small.data", size_threshold=0)
    np.testing.assert_array_equal(simulate(backbone).run(SAMPLE)["logits"], expected["logits"])


def test_other_inputs_are_refused(backbone: Path) -> None:
    with pytest.raises(InputError, match="takes image, not picture"):
        simulate(backbone).run({"picture": SAMPLE["image"]})


def test_what_is_not_onnx_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("no model")
    with pytest.raises(InputError):
        simulate(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if spec.weights is None])
def test_every_backbone(name: str, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    save_file(distinct(build(MODELS[name])).state_dict(), weights)
    path = mobilemix.export(name, weights=weights, target="onnx", precision="fp32", output=tmp_path).path
    (given,) = onnx.load(path).graph.input
    shape = [each.dim_value for each in given.type.tensor_type.shape.dim]
    sample = {given.name: np.random.default_rng(0).standard_normal(shape, np.float32)}
    assert relative_l2(simulate(path).run(sample)["logits"], OnnxRunner(path).run(sample)["logits"]) < ROUNDING
