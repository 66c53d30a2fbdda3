"""Which range values span in an int8 file, and which layers stay in float."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from conftest import NETWORK

from mobilemix import api
from mobilemix.errors import UnknownNameError
from mobilemix.quantization.data import calibration
from mobilemix.quantization.options import Quantization
from mobilemix.recipe import Recipe
from mobilemix.targets import find_target
from mobilemix.targets.base import Lowered

pytest.importorskip("litert_torch", reason="needs pip install 'mobilemix[litert]'")

from mobilemix.targets.litert import checks, convert, flatbuffer, quantize
from mobilemix.targets.litert.runtime import LiteRTRunner


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOBILEMIX_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    (folder / "quantized_net.py").write_text(NETWORK)
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "input_shapes": ((1, 3, 16, 16),)}
    return Recipe(model=f"{folder}/quantized_net.py:make", target="litert", precision="int8", **options)


@pytest.fixture(scope="module")
def lowered(recipe: Recipe) -> Lowered:
    return api._specialise(api.prepare(recipe), find_target("litert"), recipe)[0]


@pytest.fixture(scope="module")
def content(lowered: Lowered) -> bytes:
    return convert.float_build(lowered.program, lowered.input_names, lowered.output_names)


def compiled(lowered: Lowered, recipe: Recipe, path: Path, **options: object) -> LiteRTRunner:
    convert.write(lowered, dataclasses.replace(recipe, quantization=Quantization(**options)), path)
    return LiteRTRunner.from_file(path)


def dtypes(runner: LiteRTRunner, operator: str) -> set[str]:
    """Of the first outputs of the operators of one type."""
    graph = runner.model.subgraphs[0]
    of_type = [each for each in graph.operators if flatbuffer.operator(runner.model, each) == operator]
    return {flatbuffer.dtype(graph.tensors[each.outputs[0]]) for each in of_type}


def test_whole_ranges_are_the_default(lowered: Lowered, content: bytes) -> None:
    samples = calibration(lowered, Quantization(samples=3))
    values = [dict(LiteRTRunner(content).values(sample)) for sample in samples]
    found = quantize.ranges(content, samples, quantize.OBSERVER)
    for name in values[0]:
        every = np.concatenate([each[name].ravel() for each in values])
        assert found[name]["min"] == min(0, every.min())
        assert found[name]["max"] == max(0, every.max())
        assert found[name]["min"].ndim == values[0][name].ndim


def test_other_observers_clip_values_and_no_weights(lowered: Lowered, content: bytes) -> None:
    samples = calibration(lowered, Quantization(samples=3))
    whole, clipped = (quantize.ranges(content, samples, name) for name in ("min-max", "entropy"))
    constants = {flatbuffer.text(tensor.name) for _, (tensor, _) in quantize._constants(flatbuffer.parse(content))}
    assert set(whole) == set(clipped)
    assert all(whole[name] == clipped[name] for name in constants)
    assert sum(clipped[name]["max"] < whole[name]["max"] for name in whole.keys() - constants) > 3


def test_the_observer_of_a_recipe_counts(lowered: Lowered, recipe: Recipe, tmp_path: Path) -> None:
    files = []
    for observer in (None, "min-max", "mse"):
        compiled(lowered, recipe, tmp_path / "model.tflite", observer=observer)
        files.append((tmp_path / "model.tflite").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize(("pattern", "operator"), [("head", "FULLY_CONNECTED"), ("norm/conv2d*", "CONV_2D")])
def test_layers_stay_in_float(
    lowered: Lowered, recipe: Recipe, content: bytes, tmp_path: Path, pattern: str, operator: str
) -> None:
    plain = compiled(lowered, recipe, tmp_path / "plain.tflite", samples=2)
    kept = compiled(lowered, recipe, tmp_path / "kept.tflite", samples=2, layers=((pattern, "float"),))
    assert (dtypes(plain, operator), dtypes(kept, operator)) == ({"int8"}, {"float32"})
    options = Quantization(layers=((pattern, "float"),))
    names = quantize.kept(flatbuffer.parse(content), options, convert.layers_of(lowered))
    assert names
    assert checks.floats(kept.model, names).passed
    assert not checks.floats(plain.model, names).passed


def test_the_last_pattern_counts(lowered: Lowered, content: bytes) -> None:
    model, layers = flatbuffer.parse(content), convert.layers_of(lowered)
    every = quantize.kept(model, Quantization(layers=(("*", "float"),)), layers)
    some = quantize.kept(model, Quantization(layers=(("*", "float"), ("head", "int8"))), layers)
    assert len(every) == len(model.subgraphs[0].operators)
    assert {name for name in every - some if layers[name.split(";")[0]].module == "head"} == every - some != set()


def test_a_pattern_that_fits_no_layer_is_refused(lowered: Lowered, content: bytes) -> None:
    model, layers = flatbuffer.parse(content), convert.layers_of(lowered)
    with pytest.raises(UnknownNameError, match="layer 'haed'"):
        quantize.kept(model, Quantization(layers=(("haed", "float"),)), layers)
