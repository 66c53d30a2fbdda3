import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_flowers.py"
CLASSES = ("dark", "light")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two classes of noise images, one dark and one light, 12 to train and 4 to validate."""
    random = np.random.RandomState(0)
    for split, count in (("train", 6), ("val", 2)):
        for offset, name in zip((0, 128), CLASSES, strict=True):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.randint(0, 128, (40, 56, 3)) + offset
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.jpg")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_flowers", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(example: ModuleType, data: Path, out: Path, *options: str) -> None:
    sizes = ("--size", "64", "--eval-size", "48", "--batch-size", "6", "--check-every", "1", "--device", "cpu")
    example.main(["--data", str(data), "--out", str(out), *sizes, *options])


def test_two_epochs_then_a_third(example: ModuleType, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(example, data, out, "--epochs", "2")
    run(example, data, out, "--epochs", "3", "--resume")

    log = [json.loads(line) for line in (out / "epochs.jsonl").read_text().splitlines()]
    assert [(record["epoch"], record["size"]) for record in log] == [(1, 32), (2, 64), (3, 64)]
    assert [record["progress"] for record in log] == [0.5, 1.0, 1.0]

    with safe_open(out / "model.safetensors", "pt") as file:
        metadata = file.metadata()
        head = file.get_tensor("classifier.fc.weight")
    assert metadata["classes"] == ",".join(CLASSES)
    assert metadata["input_size"] == "48"
    assert head.dtype == torch.float16
    assert head.shape[0] == len(CLASSES)


def test_time_budget_ends_the_training(example: ModuleType, data: Path, tmp_path: Path) -> None:
    run(example, data, tmp_path / "run", "--minutes", "0.001")
    (record,) = (tmp_path / "run" / "epochs.jsonl").read_text().splitlines()
    assert json.loads(record)["progress"] == 1.0
