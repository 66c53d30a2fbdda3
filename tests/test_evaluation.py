import dataclasses
import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPE
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn

import mobilemix
from mobilemix import evaluation
from mobilemix.errors import InputError
from mobilemix.evaluation import Truth, measure, truth_of
from mobilemix.preprocess import Preprocess
from mobilemix.quantization.data import Form, open_dataset
from mobilemix.signature import Input
from mobilemix.targets import is_installed
from mobilemix.targets.base import Array, Inputs

FLOAT32 = 1e-6
COLOURS = ("red", "green", "blue")
FORM = Form((Input("image", (1, 3, 8, 8)),), frozenset({"image"}), preprocess=Preprocess(8, 8, (0.0,) * 3, (1.0,) * 3))


class Colour(nn.Module):
    """Three classes: the channel that is brightest."""

    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3))


class Runner:
    """An artifact that answers as a function does."""

    def __init__(self, answer: Callable[[Array], Array]) -> None:
        self._answer = answer
        self.batches: list[int] = []

    def run(self, inputs: Inputs) -> dict[str, Array]:
        (image,) = inputs.values()
        self.batches.append(len(image))
        return {"logits": self._answer(image.mean((2, 3)))}

    def values(self, inputs: Inputs) -> Iterator[tuple[str, Array]]:
        yield from self.run(inputs).items()


def paint(folder: Path, colour: str, number: int, shown: str | None = None) -> None:
    """An image of one colour in the folder of that or another."""
    level = np.zeros((8, 8, 3), np.uint8)
    level[..., COLOURS.index(shown or colour)] = 100 + number
    (folder / colour).mkdir(parents=True, exist_ok=True)
    Image.fromarray(level).save(folder / colour / f"{number}.png")


@pytest.fixture
def colours(tmp_path: Path) -> Path:
    """Four images of each colour; one that is called blue is red."""
    folder = tmp_path / "colours"
    for colour, number in itertools.product(COLOURS, range(4)):
        paint(folder, colour, number, "red" if (colour, number) == ("blue", 3) else None)
    return folder


def evaluated(
    folder: Path, runner: Runner, module: nn.Module | None = None, **options: object
) -> evaluation.Evaluation:
    dataset = open_dataset(folder, options.pop("form", FORM))
    options.setdefault("truth", truth_of(dataset, folder, COLOURS, 3))
    return measure(runner, module or Colour(), dataset, FORM, ["logits"], **{"classes": 3, **options})


def test_an_artifact_that_is_the_float_model(colours: Path) -> None:
    found = evaluated(colours, Runner(lambda logits: logits))
    assert (found.samples, found.skipped, found.classes, found.labelled) == (12, 0, 3, "names")
    assert (found.top1.count, found.top1.of, found.float_top1.count) == (11, 12, 11)
    assert found.agreement.count == 12
    assert found.top5 is found.float_top5 is None
    assert found.cosine == pytest.approx(1, abs=FLOAT32)
    assert dataclasses.replace(found.paired, low=0, high=0) == evaluation.Paired(11, 0, 0, 1, 0.0, 0, 0, 1.0)
    assert found.seconds > 0


def test_an_artifact_that_sees_blue_as_green(colours: Path) -> None:
    found = evaluated(colours, Runner(lambda logits: logits[:, [0, 2, 1]] + [[0, 1e-3, 0]]))
    # All greens are seen as blue, three blues as green; the red one among the blues is still wrong.
    assert (found.top1.count, found.float_top1.count, found.agreement.count) == (4, 11, 5)
    paired = found.paired
    assert (paired.both, paired.artifact_only, paired.float_only, paired.neither) == (4, 0, 7, 1)
    assert paired.difference == pytest.approx(-7 / 12)
    assert paired.low < -7 / 12 < paired.high < 0
    assert paired.p == pytest.approx(2 / 2**7)


def test_outputs_that_are_not_finite_are_never_right(colours: Path) -> None:
    found = evaluated(colours, Runner(lambda logits: logits * np.float32("nan")))
    assert (found.top1.count, found.agreement.count, found.cosine) == (0, 0, 0.0)


def test_the_true_class_among_the_first_five(tmp_path: Path) -> None:
    class Seven(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return torch.cat([image.mean((2, 3)), torch.full((len(image), 4), 0.1)], dim=1)

    for colour in COLOURS:
        paint(tmp_path, colour, 0)
    # Of classes 0 to 6 the artifact ranks 4 and 5 last, and 6, 3, 2, 1, 0 from the top.
    runner = Runner(lambda logits: np.array([[1, 2, 3, 4, 0, -1, 5]], np.float32))
    dataset = open_dataset(tmp_path, FORM)
    labels = np.array([0, 4, 6])
    found = measure(runner, Seven(), dataset, FORM, ["logits"], truth=Truth(labels, "file"), classes=7)
    assert (found.top1.count, found.top5.count) == (1, 2)
    assert found.float_top5.of == 3


def test_a_choice_of_samples(colours: Path) -> None:
    found = evaluated(colours, Runner(lambda logits: logits), samples=3, seed=1)
    assert found.samples == found.top1.of == 3
    assert found.top1.value == pytest.approx(found.top1.count / 3)


def test_skipped_files_are_counted_and_loose_ones_have_no_class(colours: Path) -> None:
    (colours / "notes.txt").write_text("no image")
    (colours / "red" / "0.png").write_bytes(b"")
    shutil.copy(colours / "red" / "1.png", colours / "loose.png")
    found = evaluated(colours, Runner(lambda logits: logits))
    assert (found.samples, found.skipped, found.agreement.of, found.top1.of) == (12, 2, 12, 11)


def test_a_flat_folder_tells_agreement_alone(colours: Path) -> None:
    found = evaluated(colours / "red", Runner(lambda logits: logits))
    assert (found.top1, found.paired, found.labelled, found.agreement.count) == (None, None, None, 4)


def test_outputs_that_are_no_classes_are_compared_as_vectors(colours: Path) -> None:
    found = evaluated(colours, Runner(lambda logits: logits[:, [1, 2, 0]]), classes=0, truth=None)
    assert (found.top1, found.agreement) == (None, None)
    assert found.cosine == pytest.approx(0, abs=FLOAT32)


@pytest.mark.parametrize("coupled", ["couples its samples", "takes one"])
def test_the_float_model_sees_samples_alone_where_company_changes_them(colours: Path, coupled: str) -> None:
    class Alone(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            pooled = image.mean((2, 3))
            return pooled.reshape(1, 3) if coupled == "takes one" else pooled / pooled.max()

    found = evaluated(colours, Runner(lambda logits: logits / logits.max()), Alone())
    assert found.cosine == pytest.approx(1, abs=FLOAT32)
    assert found.float_top1.count == 11


def test_a_batch_is_filled_and_its_rest_not_counted(colours: Path) -> None:
    form = dataclasses.replace(FORM, size=5)
    dataset = open_dataset(colours, form)
    runner = Runner(lambda logits: logits)
    found = measure(runner, Colour(), dataset, form, ["logits"], truth=None, classes=3)
    assert runner.batches == [5, 5, 5]
    assert (found.samples, found.agreement.count) == (12, 12)
    with pytest.raises(InputError, match="not the first axis of every output"):
        measure(Runner(lambda logits: logits[:1]), Colour(), dataset, form, ["logits"], truth=None, classes=3)


@pytest.mark.parametrize(
    ("folders", "labels", "expected", "known_from"),
    [
        (["Red", "GREEN", "blue"], COLOURS, {"Red": 0, "GREEN": 1, "blue": 2}, "names"),
        (["great_white  shark"], ["tench", "Great white shark"], {"great_white  shark": 1}, "names"),
        (["b", "a", "c"], COLOURS, {"a": 0, "b": 1, "c": 2}, "order"),
        (["b", "a"], None, {"a": 0, "b": 1}, "order"),
        ([str(number) for number in range(11)], None, {str(number): number for number in range(11)}, "order"),
        (["2", "1", "10"], COLOURS, {"1": 0, "2": 1, "10": 2}, "order"),
    ],
)
def test_class_folders(
    tmp_path: Path, folders: list[str], labels: list[str] | None, expected: dict[str, int], known_from: str
) -> None:
    for folder in folders:
        paint(tmp_path, "red", 0)
        (tmp_path / folder / "below").mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "red" / "0.png", tmp_path / folder / "below" / "0.png")
        shutil.rmtree(tmp_path / "red") if "red" not in folders else None
    dataset = open_dataset(tmp_path, FORM)
    truth = truth_of(dataset, tmp_path, labels, len(labels or folders))
    found = {
        file.relative_to(tmp_path).parts[0]: int(each) for file, each in zip(dataset.files, truth.classes, strict=True)
    }
    assert (found, truth.known_from) == (expected, known_from)


@pytest.mark.parametrize("folders", [["red", "green", "yellow"], ["a", "b"], ["a", "b", "c", "d"]])
def test_class_folders_that_are_not_the_models(tmp_path: Path, folders: list[str]) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    with pytest.raises(InputError, match=r"no class of the model is called as the folders .*such as red"):
        truth_of(open_dataset(tmp_path, FORM), tmp_path, COLOURS, 3)


def test_labels_in_a_file(tmp_path: Path) -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[0, ..., 1] = images[1, ..., 2] = 200
    path = tmp_path / "a.npz"
    np.savez(path, image=images, labels=np.array([1, 0]))
    found = evaluated(path, Runner(lambda logits: logits))
    assert (found.labelled, found.top1.count, found.top1.of) == ("file", 1, 2)
    np.savez(path, image=images, labels=np.array([1, 3]))
    with pytest.raises(InputError, match="from 1 to 3; the model has 3 classes"):
        evaluated(path, Runner(lambda logits: logits))


@pytest.mark.parametrize(
    ("count", "of", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_as_published(count: int, of: int, low: float, high: float) -> None:
    """R. G. Newcombe, Statistics in Medicine 17 (1998), table I: the score method without correction."""
    share = evaluation._share([True] * count + [False] * (of - count))
    assert (share.low, share.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemars_p_is_the_share_of_coin_flips_as_uneven(one: int, other: int) -> None:
    total, uneven = one + other, abs(one - other)
    as_uneven = sum(math.comb(total, heads) for heads in range(total + 1) if abs(2 * heads - total) >= uneven)
    assert evaluation._mcnemar(one, other) == pytest.approx(as_uneven / 2**total)


@pytest.mark.parametrize(("first", "second"), [(0.02, 0.02), (0.1, 0.02), (0.05, 0.2), (0.3, 0.3)])
def test_the_interval_of_a_difference_covers_it(first: float, second: float) -> None:
    """By enumeration of all outcomes of 40 samples, of which the artifact alone has `first` right, and so on."""
    size, covered = 40, 0.0
    for one in range(size + 1):
        for other in range(size + 1 - one):
            rest = size - one - other
            ways = math.comb(size, one) * math.comb(size - one, other)
            chance = ways * first**one * second**other * (1 - first - second) ** rest
            if chance > 1e-9:
                paired = evaluation._paired([(True, False)] * one + [(False, True)] * other + [(True, True)] * rest)
                covered += chance * (paired.low <= first - second <= paired.high)
    assert covered > 0.93


TARGETS = [
    "onnx",
    "coreml",
    "tensorrt",
    pytest.param("litert", marks=pytest.mark.skipif(not is_installed("litert"), reason="needs mobilemix[litert]")),
]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve images of noise in four class folders."""
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "pictures" / f"class {number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("target", TARGETS)
def test_every_artifact_that_runs_here(network: str, pictures: Path, tmp_path: Path, target: str) -> None:
    shape = tuple(map(int, SHAPE.split("x")))
    exported = mobilemix.export(network, target=target, input_shapes=(shape,), output=tmp_path)
    stages: list[str] = []
    found = mobilemix.evaluate(exported.path, pictures, listener=stages.append)
    assert (found.samples, found.labelled, found.classes) == (12, "order", 4)
    assert found.agreement.count == 12
    assert found.top1 == found.float_top1
    assert found.cosine > 1 - 1e-4
    assert stages == ["load", "evaluate"]
    other = mobilemix.evaluate(exported.path, pictures, model=torch.nn.Sequential(Colour(), nn.Linear(3, 4)), samples=4)
    assert (other.samples, other.cosine < 0.999) == (4, True)


def test_an_open_batch_is_evaluated_at_its_most_frequent_size(network: str, pictures: Path, tmp_path: Path) -> None:
    exported = mobilemix.export(
        network, target="onnx", input_shapes=((1, 3, 16, 16),), dynamic_batch=(2, 5, 8), output=tmp_path
    )
    found = mobilemix.evaluate(exported.path, pictures)
    assert (found.samples, found.agreement.count, found.agreement.of) == (12, 12, 12)


TOKENS = """
import torch
from torch import nn


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(9, 4)

    def forward(self, ids, spectrum):
        return torch.fft.ifft(torch.fft.fft(self.words(ids)) * spectrum)
"""


def test_inputs_that_are_no_image(tmp_path: Path) -> None:
    (tmp_path / "tokens.py").write_text(TOKENS)
    exported = mobilemix.export(
        f"{tmp_path}/tokens.py:Tokens",
        target="onnx",
        input_shapes=((1, 6), (6, 4)),
        input_dtypes=("int64", "complex64"),
        output=tmp_path,
    )
    generator = np.random.default_rng(0)
    spectrum = generator.standard_normal((5, 6, 4)) + 1j * generator.standard_normal((5, 6, 4))
    np.savez(tmp_path / "a.npz", ids=generator.integers(0, 9, (5, 6)), spectrum=spectrum)
    found = mobilemix.evaluate(exported.path, tmp_path / "a.npz")
    assert (found.samples, found.agreement) == (5, None)
    assert found.cosine == pytest.approx(1, abs=FLOAT32)


def test_the_command(command, network: str, pictures: Path, tmp_path: Path) -> None:
    artifact = mobilemix.export(network, target="onnx", input_shapes=((1, 3, 16, 16),), output=tmp_path).path
    (pictures / "class 0" / "broken.jpg").touch()
    code, out, err = command("evaluate", artifact, pictures)
    assert code == 0
    assert "note: 1 of 13 files was skipped: broken.jpg (cannot identify image file)\n" in err
    assert "taken in their order" in err
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:3]] == ["artifact", "float PyTorch"]
    assert lines[3].startswith("difference +0.0 points (")
    assert lines[-1].startswith(f"evaluated {artifact} · 12 samples, 1 skipped · same first class 100.0% (")
    code, out, _ = command("evaluate", artifact, pictures / "class 1", "--samples", 2, "--seed", 3, "--json")
    assert code == 0
    found = json.loads(out)["evaluation"]
    assert (found["samples"], found["top1"], found["agreement"]["count"]) == (2, None, 2)


def test_what_cannot_be_evaluated_is_one_line(command, network: str, pictures: Path, tmp_path: Path) -> None:
    artifact = mobilemix.export(network, target="onnx", input_shapes=((1, 3, 16, 16),), output=tmp_path).path
    shutil.copy(artifact, tmp_path / "stray.onnx")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["none.onnx", pictures], "there is no artifact none.onnx"),
        ([tmp_path / "stray.onnx", pictures], "there is no manifest"),
        ([tmp_path / "net.engine", pictures], "is an engine"),
        ([artifact, tmp_path / "nowhere"], "there is no data set"),
        ([artifact, tmp_path / "empty"], "there is no image in the folder"),
        ([artifact, artifact], "neither a folder of images nor"),
        ([artifact, pictures, "--samples", 0], "samples must be at least 1"),
        ([artifact, pictures, "--seed", -1], "seed must be at least 0"),
    ):
        code, out, err = command("evaluate", *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert len(err.strip().splitlines()) == 1
