import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coreml_lowered import CLASSES, FP16, FP32, IMAGE, LABELS, MEAN, SIZE, STD, Mixer, lowered, samples
from coreml_packages import seeded
from torch import nn

from mobilemix import parity
from mobilemix.errors import InputError, TargetError, UnsupportedOpError
from mobilemix.files import sha256
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Array, Lowered
from mobilemix.targets.coreml import CoreMLTarget
from mobilemix.targets.coreml.convert import convert
from mobilemix.targets.coreml.interface import take_unscaled
from mobilemix.targets.coreml.package import Package, read_package
from mobilemix.targets.coreml.target import PackageRunner

FP32_TOLERANCE = 1e-6
FP16_TOLERANCE = 5e-3
ROUNDING = 2.0**-24
IMAGE_FP32 = dataclasses.replace(IMAGE, precision="fp32")


@pytest.fixture(scope="module")
def mixer() -> Lowered:
    return lowered()


def package(model: Lowered, recipe: Recipe, folder: Path) -> Package:
    path = folder / f"{recipe.precision}-{recipe.input}-{recipe.minimum_ios}.mlpackage"
    convert(model, recipe, path)
    return read_package(path)


def logits(found: Package, sample: dict[str, Array]) -> Array:
    return PackageRunner(found).run(sample)["logits"]


def expected(model: Lowered, sample: dict[str, Array]) -> Array:
    return parity.reference(model.program.module(), [sample]).outputs[0][0]


@pytest.mark.parametrize("ios", [15, 16, 17, 18])
def test_every_ios_version(mixer: Lowered, ios: int, tmp_path: Path) -> None:
    found = package(mixer, dataclasses.replace(FP16, minimum_ios=ios), tmp_path)
    assert found.opset == f"CoreML{ios - 10}"
    assert parity.relative_l2(logits(found, samples()[0]), expected(mixer, samples()[0])) < FP16_TOLERANCE


@pytest.mark.parametrize("recipe", [FP16, FP32])
def test_the_interface_is_float32_whatever_the_precision(mixer: Lowered, recipe: Recipe, tmp_path: Path) -> None:
    found = package(mixer, recipe, tmp_path)
    assert [(each.dtype, each.image) for each in found.inputs.values()] == [("fp32", None)]
    assert found.outputs == ("logits",)
    dtypes = {output.dtype for each in found.operations for output in each.outputs if each.type == "conv"}
    assert dtypes == {recipe.precision}


def test_values_keep_the_names_of_the_graph(mixer: Lowered, tmp_path: Path) -> None:
    found = package(mixer, FP32, tmp_path)
    named = {output.name for each in found.operations if each.type != "const" for output in each.outputs}
    assert len(named & {node.name for node in mixer.program.graph.nodes}) > len(named) / 2


def test_a_package_has_its_three_files_and_the_same_bytes_every_time(mixer: Lowered, tmp_path: Path) -> None:
    hashes = set()
    for name in ("one", "two"):
        path = tmp_path / name / "mixer.mlpackage"
        path.parent.mkdir()
        convert(dataclasses.replace(mixer, labels=LABELS), IMAGE, path)
        hashes.add(sha256(path))
        assert sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()) == [
            "Data/com.apple.CoreML/model.mlmodel",
            "Data/com.apple.CoreML/weights/weight.bin",
            "Manifest.json",
        ]
        assert list(path.parent.iterdir()) == [path]
    assert len(hashes) == 1


def test_metadata(mixer: Lowered, tmp_path: Path) -> None:
    metadata = {
        "author": "A. Author",
        "license": "Apache-2.0",
        "version": "1.2",
        "description": "Tells flowers apart",
        "paper": "2307.14008",
    }
    found = package(dataclasses.replace(mixer, metadata=metadata), IMAGE, tmp_path).spec.description
    assert found.metadata.author == "A. Author"
    assert found.metadata.license == "Apache-2.0"
    assert found.metadata.versionString == "1.2"
    assert found.metadata.shortDescription == "Tells flowers apart"
    assert found.metadata.userDefined["paper"] == "2307.14008"
    assert not any("date" in key for key in found.metadata.userDefined)
    assert all(feature.shortDescription for feature in (*found.input, *found.output))


def test_labels_make_a_classifier_that_keeps_the_logits(mixer: Lowered, tmp_path: Path) -> None:
    plain = package(mixer, FP16, tmp_path)
    (tmp_path / "labels").mkdir()
    found = package(dataclasses.replace(mixer, labels=LABELS), FP16, tmp_path / "labels")
    assert found.labels == LABELS
    assert found.spec.description.predictedFeatureName == "classLabel"
    assert found.spec.description.predictedProbabilitiesName == "classLabel_probs"
    runner = PackageRunner(found)
    values = runner.executor.run(samples()[0])
    softmax = torch.softmax(torch.from_numpy(values["logits"]), -1).numpy()
    np.testing.assert_allclose(np.ravel(values["classLabel_probs"]), np.ravel(softmax), rtol=FP32_TOLERANCE)
    assert values["classLabel"] == LABELS[int(np.argmax(softmax))]
    assert list(runner.run(samples()[0])) == ["logits"]
    np.testing.assert_array_equal(values["logits"], logits(plain, samples()[0]))


def test_small_probabilities_are_not_flushed(tmp_path: Path) -> None:
    module = seeded(Mixer())
    with torch.no_grad():
        module.head.bias[0] = 30
    found = package(lowered(module, labels=LABELS), FP16, tmp_path)
    probabilities = PackageRunner(found).executor.run(samples()[0])["classLabel_probs"]
    assert 0 < np.min(probabilities) < 2.0**-25


def test_several_images_have_plain_outputs_in_spite_of_labels(tmp_path: Path) -> None:
    model = lowered(shape=(2, 3, SIZE, SIZE), labels=LABELS)
    found = package(model, FP32, tmp_path)
    assert found.outputs == ("logits",)
    (sample,) = samples(shape=(2, 3, SIZE, SIZE))
    assert parity.relative_l2(logits(found, sample), expected(model, sample)) < FP32_TOLERANCE


class TwoConsumers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return (self.one(image) * self.two(image)).mean((2, 3))


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, groups=3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.conv(image).mean((2, 3))


class NoConvolution(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(image).mean((2, 3))


@pytest.mark.parametrize(
    ("module", "multiplications"), [(Mixer(), 0), (TwoConsumers(), 1), (Depthwise(), 1), (NoConvolution(), 1)]
)
def test_an_image_package_fed_pixels_equals_a_tensor_package_fed_normalised(
    module: nn.Module, multiplications: int, tmp_path: Path
) -> None:
    model = lowered(seeded(module))
    image, tensor = (package(model, recipe, tmp_path) for recipe in (IMAGE_FP32, FP32))
    assert image.inputs["image"].image == "RGB"
    pixels = np.random.default_rng(1).integers(0, 256, (1, 3, SIZE, SIZE)).astype(np.float32)
    mean, std = (np.reshape(value, (1, 3, 1, 1)) for value in (MEAN, STD))
    normalised = {"image": ((pixels / 255 - mean) / std).astype(np.float32)}
    direct = PackageRunner(image).executor.run({"image": pixels})["logits"]
    assert parity.relative_l2(direct, logits(tensor, normalised)) < FP32_TOLERANCE
    assert parity.relative_l2(logits(image, normalised), logits(tensor, normalised)) < FP32_TOLERANCE
    counts = [sum(each.type == "mul" for each in found.operations) for found in (image, tensor)]
    assert counts[0] - counts[1] == 1 + multiplications, "the scale of 1/255, and 1/std where it could not be folded"


def test_preprocessing_runs_in_float32_and_is_rounded_once(mixer: Lowered, tmp_path: Path) -> None:
    image, tensor = (package(mixer, recipe, tmp_path) for recipe in (IMAGE, FP16))
    first = [each for each in image.operations if each.type != "const"][:3]
    assert [(each.type, each.outputs[0].dtype) for each in first] == [
        ("mul", "fp32"),
        ("add", "fp32"),
        ("cast", "fp16"),
    ]
    (sample,) = samples()
    errors = [parity.relative_l2(logits(found, sample), expected(mixer, sample)) for found in (image, tensor)]
    assert max(errors) < FP16_TOLERANCE


def test_folding_rounds_each_weight_once() -> None:
    model = lowered()
    before = model.program.state_dict["stem.0.weight"].double()
    after = take_unscaled(model.program, STD).state_dict
    folded = next(tensor for name, tensor in after.items() if name.startswith("stem.0.weight"))
    exact = before / torch.tensor(STD, dtype=torch.float64).reshape(1, 3, 1, 1)
    assert bool(((folded - exact).abs() <= ROUNDING * exact.abs()).all())
    assert torch.equal(model.program.state_dict["stem.0.weight"].double(), before), "the source stays as it is"


def test_one_channel_is_a_grey_image(tmp_path: Path) -> None:
    model = lowered(seeded(Mixer(channels=1)), (1, 1, SIZE, SIZE), mean=(0.45,), std=(0.22,))
    found = package(model, IMAGE_FP32, tmp_path)
    assert found.inputs["image"].image == "GRAYSCALE"
    (sample,) = samples(shape=(1, 1, SIZE, SIZE))
    assert parity.relative_l2(logits(found, sample), expected(model, sample)) < FP32_TOLERANCE


def test_the_normalisation_travels_in_the_metadata(mixer: Lowered, tmp_path: Path) -> None:
    found = package(mixer, IMAGE, tmp_path)
    stored = json.loads(found.spec.description.metadata.userDefined["mobilemix.normalisation"])
    assert stored == {"mean": list(MEAN), "std": list(STD)}


def test_nothing_is_printed(mixer: Lowered, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    convert(mixer, FP16, tmp_path / "mixer.mlpackage")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("changes", "shape", "recipe", "message"),
    [
        ({"mean": None, "std": None}, (1, 3, SIZE, SIZE), IMAGE, "no mean and std .* use --input tensor"),
        ({}, (2, 3, SIZE, SIZE), IMAGE, "not 2x3x16x16; use --input tensor"),
        ({"mean": (0.5,), "std": (0.5,)}, (1, 3, SIZE, SIZE), IMAGE, "1 channels, the input 3"),
        ({"labels": LABELS[:3]}, (1, 3, SIZE, SIZE), FP16, f"3 labels for {CLASSES} outputs"),
        ({"labels": ("rose", *LABELS[1:])}, (1, 3, SIZE, SIZE), FP16, "'rose' occurs more than once"),
    ],
)
def test_refuses(
    changes: dict[str, object], shape: tuple[int, ...], recipe: Recipe, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        convert(lowered(shape=shape, **changes), recipe, tmp_path / "mixer.mlpackage")
    assert not list(tmp_path.iterdir())


class Bessel(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(image)


class RankSix(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.reshape(1, 3, 4, 4, 4, 4).permute(0, 1, 2, 4, 3, 5).sigmoid()


def test_an_unsupported_operator_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOpError, match=r"bessel_j0.*test_convert\.py:\d+ \(return torch\.special"):
        convert(lowered(Bessel()), FP16, tmp_path / "bessel.mlpackage")
    assert not list(tmp_path.iterdir())


def test_a_refusal_is_one_line_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"^Core ML refuses .*test_convert\.py:\d+") as caught:
        convert(lowered(RankSix()), FP16, tmp_path / "rank.mlpackage")
    assert "\n" not in str(caught.value)


class Passed(nn.Module):
    """Outputs that Core ML could not tell apart: an input, and a value twice."""

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        value = image.sigmoid()
        return image, value, value


@pytest.mark.parametrize("recipe", [FP16, FP32])
def test_an_input_or_a_value_twice_as_outputs(recipe: Recipe, tmp_path: Path) -> None:
    model = lowered(Passed(), output_names=("one", "two", "three"))
    path = tmp_path / "passed.mlpackage"
    convert(model, recipe, path)
    values = PackageRunner(read_package(path)).run(samples()[0])
    assert parity.relative_l2(values["one"], samples()[0]["image"]) < FP16_TOLERANCE
    np.testing.assert_array_equal(values["two"], values["three"])
    assert all(check.passed is not False for check in CoreMLTarget().checks(model, recipe, path, samples()))


def test_a_scale_and_shift_by_channel_is_not_made_a_batch_norm(tmp_path):
    """coremltools would give that batch norm an epsilon of 1e-5: a relative error of 5e-6, every time."""

    class Affine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([1.5, 0.5, 2.0]).reshape(1, 3, 1, 1))
            self.shift = nn.Parameter(torch.tensor([0.5, -1.0, 0.25]).reshape(1, 3, 1, 1))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.tanh(torch.sigmoid(image) * self.scale + self.shift)

    found = package(lowered(Affine(), output_names=("output",)), FP32, tmp_path)
    assert "batch_norm" not in {each.type for each in found.operations}
    (sample,) = samples()
    (expected,) = parity.reference(Affine(), [sample]).outputs[0]
    assert parity.relative_l2(PackageRunner(found).run(sample)["output"], expected) < FP32_TOLERANCE
