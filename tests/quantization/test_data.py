import dataclasses
import itertools
import os
from pathlib import Path

import numpy as np
import onnx_cases
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import mobilemix
from mobilemix import assets
from mobilemix.errors import InputError
from mobilemix.preprocess import Preprocess
from mobilemix.quantization import data
from mobilemix.quantization.cache import digest
from mobilemix.quantization.options import Quantization
from mobilemix.recipe import Recipe
from mobilemix.signature import Input
from mobilemix.targets.base import Inputs, Lowered
from mobilemix.targets.onnx import OnnxTarget

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PREPROCESS = Preprocess(8, 10, MEAN, STD, 1.0)
IMAGE = data.Form((Input("image", (1, 3, 8, 10)),), frozenset({"image"}), preprocess=PREPROCESS)
TWO = data.Form((Input("ids", (1, 6), "int64", 9), Input("table", (6, 4, 2))), frozenset({"ids"}))
TWO = dataclasses.replace(TWO, complex_names=frozenset({"table"}))


class Pooled(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.mean((2, 3))


def lowered(*shape: int, **fields: object) -> Lowered:
    described = {"mean": MEAN, "std": STD, "crop_pct": 1.0, **fields}
    return onnx_cases.lower(Pooled(), torch.zeros(shape or (1, 3, 8, 10)), **described)


def pixels(seed: int = 0, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape or (8, 10, 3), dtype=np.uint8)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def everything(dataset: data.Dataset, wanted: int | None = None, seed: int = 0) -> dict[int, Inputs]:
    return dict(itertools.chain(*dataset.read(wanted, seed)))


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """Nine images in a folder and its subfolders, among what folders of photographs also hold."""
    folder = tmp_path / "photographs"
    image = pixels()
    save(folder / "a.PNG", image)
    save(folder / "sub" / "ünïcode name.jpeg", image, quality=95)
    save(folder / "sub" / "deep" / "grey.png", image[..., 0])
    save(folder / "sub" / "deep" / "large.png", pixels(1, 90, 70, 3))
    save(folder / "sixteen.png", (image[..., 0].astype(np.uint16) * 257))
    Image.fromarray(image).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(image).convert("P").save(
        folder / "palette.gif", save_all=True, append_images=[Image.new("P", (9, 9))]
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    save(folder / "lying.jpg", pixels(2, 10, 8, 3), exif=exif)
    save(folder / "no suffix.png", image).rename(folder / "no suffix")
    # Nothing of the rest is an image.
    (folder / "empty.jpg").touch()
    (folder / "notes.txt").write_text("no image")
    whole = save(folder / "cut.jpg", pixels(3, 64, 64, 3)).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere")
    # Nor are these even tried.
    (folder / ".hidden.jpg").write_bytes(b"")
    (folder / ".git").mkdir()
    (folder / ".git" / "object").write_bytes(b"")
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "sub" / "circle").symlink_to(folder, target_is_directory=True)
    return folder


def test_a_messy_folder_gives_its_images_and_counts_the_rest(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = data.open_dataset(messy, IMAGE)
    found = everything(dataset)
    names = {dataset.files[number].name for number in found}
    assert names == {
        *("a.PNG", "ünïcode name.jpeg", "grey.png", "large.png", "sixteen.png", "cmyk.jpg", "palette.gif"),
        *("lying.jpg", "no suffix"),
    }
    assert {path.name for path in dataset.skipped} == {"empty.jpg", "notes.txt", "cut.jpg", "bomb.png", "dangling.jpg"}
    assert all(sample["image"].shape == (1, 3, 8, 10) for sample in found.values())
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: 5 of 14 files were skipped: ")
    assert line.endswith(", …")


def test_calibration_on_a_messy_folder(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = data.calibration(lowered(), Quantization(data=str(messy)))
    assert len(samples) == 9
    (image,) = samples[0].values()
    assert image.dtype == np.float32
    assert "5 of 14" in capsys.readouterr().err


def test_unreadable_files_are_made_up_for(messy: Path) -> None:
    for seed in range(5):
        assert len(data.calibration(lowered(), Quantization(data=str(messy), samples=9, seed=seed))) == 9


@pytest.mark.parametrize("content", [{}, {"notes.txt": b"no image"}, {".hidden.png": b""}])
def test_a_folder_without_an_image_is_an_error(tmp_path: Path, content: dict[str, bytes]) -> None:
    for name, value in content.items():
        (tmp_path / name).write_bytes(value)
    with pytest.raises(InputError, match=r"no image|none of the files is an image"):
        data.calibration(lowered(), Quantization(data=str(tmp_path)))


def test_images_are_preprocessed_as_the_model_wants(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", pixels(0, 30, 40, 3))
    (sample,) = data.calibration(lowered(crop_pct=0.5), Quantization(data=str(tmp_path)))
    np.testing.assert_array_equal(sample["image"], dataclasses.replace(PREPROCESS, crop_pct=0.5)(path))


@pytest.mark.parametrize(("size", "wanted"), [(100, 10), (7, 7), (7, 3), (10, 9), (1, 1)])
def test_the_order_takes_one_of_each_part_before_a_second(size: int, wanted: int) -> None:
    order = data._order(size, wanted, seed=3)
    assert sorted(order) == list(range(size))
    parts = np.array_split(np.arange(size), wanted)
    assert all(len({*order[:wanted]}.intersection(map(int, part))) == 1 for part in parts)


def test_the_seed_decides_the_choice() -> None:
    first, again, other = (data._order(1000, 20, seed)[:20] for seed in (0, 0, 1))
    assert first == again != other


def test_a_choice_is_spread_over_the_subfolders(tmp_path: Path) -> None:
    for name, number in itertools.product("abcd", range(6)):
        save(tmp_path / name / f"{number}.png", pixels(number))
    dataset = data.open_dataset(tmp_path, IMAGE)
    chosen = everything(dataset, wanted=8)
    assert sorted(dataset.files[number].parent.name for number in chosen) == list("aabbccdd")


def test_the_shipped_photographs_and_their_copies() -> None:
    samples = [sample["image"] for sample in data.calibration(lowered(), Quantization())]
    assert len(samples) == 4 * len(assets.photographs())
    seen = {sample.tobytes() for sample in samples}
    photograph = PREPROCESS(assets.photographs()[0])
    for copy in (photograph, photograph[..., ::-1], photograph[:, :, ::-1], photograph * np.float32(data.DIMMED)):
        assert copy.tobytes() in seen
    some = data.calibration(lowered(), Quantization(samples=5))
    assert len(some) == 5
    assert {sample["image"].tobytes() for sample in some} < seen


def test_a_fixed_batch_is_filled() -> None:
    samples = data.calibration(lowered(3, 3, 8, 10), Quantization(samples=4))
    singles = data.calibration(lowered(), Quantization(samples=4))
    assert [sample["image"].shape for sample in samples] == [(3, 3, 8, 10)] * 2
    order = [0, 1, 2, 3, 0, 1]
    np.testing.assert_array_equal(
        np.concatenate([sample["image"] for sample in samples]),
        np.concatenate([singles[index]["image"] for index in order]),
    )


def test_an_open_batch_is_calibrated_one_by_one() -> None:
    two, three = lowered(2, 3, 8, 10), lowered(3, 3, 8, 10)
    batch = dataclasses.replace(two, dynamic_batch=(1, 4, 8), larger=three.program)
    (sample,) = data.calibration(batch, Quantization(samples=1))
    assert sample["image"].shape == (1, 3, 8, 10)


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_pixels_in_an_array(tmp_path: Path, layout: str) -> None:
    images = pixels(0, 5, 8, 10, 3)
    np.save(tmp_path / "a.npy", images if layout == "channels last" else images.transpose(0, 3, 1, 2))
    found = everything(data.open_dataset(tmp_path / "a.npy", IMAGE))
    assert sorted(found) == list(range(5))
    for number, sample in found.items():
        np.testing.assert_array_equal(sample["image"], PREPROCESS.normalise(images[number]))


def test_a_cube_of_pixels_has_its_channels_first(tmp_path: Path) -> None:
    form = dataclasses.replace(
        IMAGE, inputs=(Input("image", (1, 3, 3, 3)),), preprocess=dataclasses.replace(PREPROCESS, height=3, width=3)
    )
    cube = pixels(0, 1, 3, 3, 3)
    np.save(tmp_path / "a.npy", cube)
    (sample,) = everything(data.open_dataset(tmp_path / "a.npy", form)).values()
    np.testing.assert_array_equal(sample["image"], form.preprocess.normalise(cube[0].transpose(1, 2, 0)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_floats_are_taken_as_normalised(tmp_path: Path, dtype: type) -> None:
    values = np.random.default_rng(0).standard_normal((4, 3, 8, 10)).astype(dtype)
    np.save(tmp_path / "a.npy", values)
    found = everything(data.open_dataset(tmp_path / "a.npy", IMAGE))
    for number, sample in found.items():
        assert sample["image"].dtype == np.float32
        np.testing.assert_array_equal(sample["image"], values[number : number + 1].astype(np.float32))


def test_several_inputs_by_name(tmp_path: Path) -> None:
    ids = np.arange(18, dtype=np.int32).reshape(3, 6) % 9
    table = np.random.default_rng(0).standard_normal((3, 6, 4)) * (1 + 2j)
    np.savez(tmp_path / "a.npz", table=table.astype(np.complex64), ids=ids, labels=np.array([0, 1, 1]))
    dataset = data.open_dataset(tmp_path / "a.npz", TWO)
    found = everything(dataset)
    assert [*found[0]] == ["ids", "table"]
    assert found[2]["ids"].dtype == np.int64
    np.testing.assert_array_equal(found[2]["ids"], ids[2:])
    np.testing.assert_array_equal(found[1]["table"][..., 1], table[1].imag.astype(np.float32))
    assert dataset.labels is not None
    assert dataset.labels.tolist() == [0, 1, 1]


NOT_FINITE = np.full((2, 3, 8, 10), np.nan, np.float32)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (pixels(0, 2, 3, 9, 10), r"uint8 \(2, 3, 9, 10\); wanted: uint8 pixels \(N, 3, 8, 10\) or \(N, 8, 10, 3\)"),
        (np.zeros((3, 8, 10), np.float32), "wanted: .* or normalised float32"),
        (np.zeros((2, 8, 10, 3), np.float32), "normalised float32"),
        (np.zeros((2, 3, 8, 10), np.int64), "int64"),
        (np.zeros((2, 3, 8, 10), np.complex64), "complex64"),
        (np.zeros((), np.float32), "wanted"),
        (np.zeros((0, 3, 8, 10), np.uint8), "no sample"),
        (NOT_FINITE, "sample [01] of image has values that are not finite"),
        (np.full_like(NOT_FINITE, -np.inf), "not finite"),
        (np.array(["a", "b"]), "wanted"),
    ],
)
def test_an_array_that_does_not_fit_says_what_would(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=message) as caught:
        everything(data.open_dataset(tmp_path / "a.npy", IMAGE))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"ids": np.zeros((3, 6), int)}, "has arrays for ids; the model takes ids, table"),
        ({}, "has arrays for nothing"),
        ({"ids": np.zeros((3, 6), int), "table": np.zeros((2, 6, 4, 2))}, "3 of ids, 2 of table"),
        (
            {"ids": np.zeros((3, 6)), "table": np.zeros((3, 6, 4, 2))},
            r"ids is float64 \(3, 6\); wanted: int64 \(N, 6\)",
        ),
        (
            {"ids": np.zeros((3, 6), int), "table": np.zeros((3, 6, 4, 2)), "labels": np.zeros(2, int)},
            r"labels is int64 \(2,\); wanted: integers \(3,\)",
        ),
    ],
)
def test_arrays_that_do_not_fit_one_another(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=message):
        data.open_dataset(tmp_path / "a.npz", TWO)


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("content", [b"", b"no array", b"PK\x03\x04 cut", b"\x93NUMPY\x01\x00v\x00{'descr'"])
def test_files_that_hold_no_array(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="cannot read"):
        data.open_dataset(tmp_path / name, IMAGE)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", image=np.array([print], dtype=object))
    for name in ("a.npy", "a.npz"):
        with pytest.raises(InputError, match="cannot read"):
            data.open_dataset(tmp_path / name, IMAGE)


def test_paths_that_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    for path, message in ((tmp_path / "a.csv", "neither a folder of images"), (tmp_path / "none", "there is no data")):
        with pytest.raises(InputError, match=message):
            data.open_dataset(path, IMAGE)
    with pytest.raises(InputError, match=r"the model's input is none; give an \.npz .*ids, table"):
        data.open_dataset(tmp_path, TWO)


def test_a_model_that_takes_no_image_is_not_calibrated_on_photographs() -> None:
    tokens = onnx_cases.lower(nn.Linear(4, 4), torch.zeros(1, 4))
    with pytest.raises(InputError, match="calibrated on photographs.*--calibration FILE.npz"):
        data.calibration(tokens, Quantization())


def test_a_model_that_takes_no_image_has_data_of_its_own(tmp_path: Path) -> None:
    values = np.arange(20, dtype=np.float32).reshape(5, 4)
    np.save(tmp_path / "a.npy", values)
    tokens = onnx_cases.lower(nn.Linear(4, 4), torch.zeros(1, 4))
    samples = data.calibration(tokens, Quantization(data=str(tmp_path / "a.npy")))
    assert sorted(float(next(iter(sample.values()))[0, 0]) for sample in samples) == [0, 4, 8, 12, 16]


def test_an_input_without_a_batch_is_one_sample() -> None:
    grid = onnx_cases.lower(nn.Linear(4, 4), torch.zeros(6, 4))
    form = data.form_of(grid)
    assert (form.size, form.batched, form.inputs[0].shape) == (1, frozenset(), (6, 4))


def test_items_from_python_with_and_without_an_axis_of_samples() -> None:
    one, several = pixels(0), pixels(1, 3, 3, 8, 10)
    floats = np.zeros((1, 3, 8, 10), np.float32)
    taken = data.take(iter([one, several, floats, {"image": one}]), IMAGE, wanted=100)
    assert len(taken) == 1 + 3 + 1 + 1
    np.testing.assert_array_equal(taken[0]["image"], PREPROCESS.normalise(one))
    np.testing.assert_array_equal(taken[5]["image"], taken[0]["image"])
    table = np.full((6, 4), 1 + 2j)
    (sample,) = data.take([{"ids": np.zeros(6, int), "table": table}], TWO, wanted=2)
    assert sample["table"][0, 0].tolist() == [1, 2]


def test_tensors_are_taken_and_endless_iterables_are_cut() -> None:
    taken = data.take((torch.full((2, 3, 8, 10), float(number)) for number in itertools.count()), IMAGE, wanted=5)
    assert [float(sample["image"][0, 0, 0, 0]) for sample in taken] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no sample"),
        ([pixels(), np.zeros((3, 8, 11), np.float32)], "item 1 of the calibration data: image is float32"),
        ([{"picture": pixels()}], "item 0 of the calibration data has arrays for picture; the model takes image"),
        ([[pixels(), 3]], "item 0 of the calibration data is no array"),
        ([NOT_FINITE], "item 0 .* not finite"),
        (["a.jpg"], "item 0"),
        ([torch.zeros(3, 8, 10, requires_grad=True)], "item 0 of the calibration data is no array"),
    ],
)
def test_items_that_do_not_fit(items: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        data.take(items, IMAGE, wanted=10)


def test_samples_given_in_python_reach_the_target_and_the_manifest(
    network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[Lowered] = []
    compile_ = OnnxTarget.compile

    def noted(target: OnnxTarget, lowered: Lowered, recipe: Recipe, destination: Path) -> object:
        compiled.append(lowered)
        return compile_(target, lowered, recipe, destination)

    monkeypatch.setattr(OnnxTarget, "compile", noted)
    given = [pixels(seed, 16, 16, 3) for seed in range(4)]
    exported = mobilemix.export(
        network,
        target="onnx",
        precision="int8-dynamic",
        input_shapes=((1, 3, 16, 16),),
        quantization=Quantization(samples=3),
        calibration=given,
        output=tmp_path,
    )
    options = exported.manifest.recipe.quantization
    samples = data.calibration(compiled[0], options)
    assert len(samples) == 3
    np.testing.assert_allclose(samples[0]["image"][0] * 255, given[0].transpose(2, 0, 1), rtol=1e-6)
    assert options.data == data.GIVEN
    assert exported.manifest.provenance["calibration"] == {"samples": 3, "sha256": digest(samples)}
    with pytest.raises(InputError, match="given in Python"):
        data.calibration(lowered(), options)
