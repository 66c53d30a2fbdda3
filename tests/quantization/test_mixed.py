from pathlib import Path

import numpy as np
import onnx_cases
import pytest
import quantization_chain
import torch
from PIL import Image
from quantization_chain import Chain
from torch import Tensor, nn

from mobilemix.errors import InputError, UnknownNameError
from mobilemix.quantization.mixed import investigate, judged, quantizable
from mobilemix.quantization.search import Judge
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Lowered

SAMPLES = quantization_chain.samples(40)
RECIPE = Recipe(target="onnx", precision="int8")


class Pooled(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3))


def lowered(batch: int = 1) -> Lowered:
    return onnx_cases.lower(
        Pooled(),
        torch.zeros(batch, 3, 4, 4),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        crop_pct=1.0,
        labels=("red", "green", "blue"),
    )


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Four in folders of two classes, and one of none."""
    for place in ("blue/1", "blue/2", "red/1", "red/2", "other"):
        path = tmp_path / f"{place}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), place.partition("/")[0] if "/" in place else "white").save(path)
    return tmp_path


def investigated(chain: Chain, max_drop: float, **fields: object):
    judge = Judge.of(chain.reference(), SAMPLES, labels=None)
    values = {"objective": "size", "progress": lambda _: None, "recipe": RECIPE, "model": "chain", **fields}
    return investigate(chain, SAMPLES, judge, max_drop=max_drop, **values)


def test_the_layer_that_spoils_the_model_stays_in_float():
    report = investigated(Chain([1e-6, 3.0, 1e-6, 1e-6]), max_drop=0.0)
    assert report.choice.chosen.kept == ("net.1/out_1",)
    assert report.choice.trials[0].drop > 0.1
    assert (report.model, report.target, report.precision, report.measure) == (
        "chain",
        "onnx",
        "int8",
        "top-1 agreement",
    )
    assert (report.samples, report.reference) == (40, 1)
    assert report.seconds == {}


def test_no_more_samples_than_there_is_time_for():
    chain = Chain([3.0, 1e-6], measured=8)
    few = investigated(chain, max_drop=0.0).sensitivities
    judge = Judge.of(chain.reference(), SAMPLES[::5], labels=None)
    on_few = investigate(
        chain,
        SAMPLES[::5],
        judge,
        objective="size",
        max_drop=0.0,
        progress=lambda _: None,
        recipe=RECIPE,
        model="chain",
    )
    assert few == on_few.sensitivities
    assert few != investigated(Chain([3.0, 1e-6]), max_drop=0.0).sensitivities


def test_configurations_are_timed_where_layers_have_times():
    report = investigated(Chain([3.0, 1e-6], seconds=1.0), max_drop=0.0)
    assert list(report.seconds) == list(report.configurations) == ["float", "all int8", "mixed"]
    assert all(seconds > 0 for seconds in report.seconds.values())


def test_a_wrong_objective_costs_no_run():
    chain = Chain([1.0])
    with pytest.raises(UnknownNameError, match="did you mean 'size'"):
        investigated(chain, max_drop=0.0, objective="sizes")
    assert chain.asked == []


def test_labelled_pictures(pictures):
    samples, labels = judged(lowered(), pictures, None, 0)
    assert sorted(labels) == [0, 0, 2, 2]
    for sample, label in zip(samples, labels, strict=True):
        assert np.argmax(sample["image"].mean((2, 3))) == label


def test_pictures_without_classes(pictures):
    samples, labels = judged(lowered(), pictures / "blue", None, 0)
    assert len(samples) == 2
    assert labels is None


def test_as_many_samples_as_are_asked_for(tmp_path):
    np.savez(tmp_path / "data.npz", image=np.zeros((9, 3, 4, 4), np.uint8), labels=np.arange(9) % 3)
    samples, labels = judged(lowered(), tmp_path / "data.npz", 5, 0)
    assert len(samples) == len(labels) == 5


def test_batches_are_refused(pictures):
    with pytest.raises(InputError, match="one sample at a time, not on 2"):
        judged(lowered(batch=2), pictures, None, 0)


def test_targets_that_cannot_mix_say_which_can(tmp_path):
    with pytest.raises(InputError, match="for coreml and onnx; export litert with --layer"):
        quantizable(lowered(), Recipe(target="litert", precision="int8"), tmp_path)
