import json
import os
from pathlib import Path

import numpy as np
import pytest

from mobilemix.quantization import cache

FOUND = {"x": (-1.5, 0.1), "y": (0.0, 3.0e38)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"graph")
    return path


class Observation:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> dict[str, tuple[float, float]]:
        self.times += 1
        return FOUND


def samples(value: float = 1.0) -> list[dict[str, np.ndarray]]:
    return [{"image": np.full((1, 2), value, np.float32)}]


def test_the_same_question_is_answered_once(folder: Path, model: Path) -> None:
    compute = Observation()
    assert cache.ranges(model, samples(), "mse", False, compute) == FOUND
    assert cache.ranges(model, samples(), "mse", False, compute) == FOUND
    assert compute.times == 1


def test_whatever_the_ranges_follow_from_makes_it_another_question(folder: Path, model: Path) -> None:
    compute = Observation()

    def ask(values: list[dict[str, np.ndarray]], observer: str = "mse", symmetric: bool = False, *more: str) -> None:
        cache.ranges(model, values, observer, symmetric, compute, *more)

    ask(samples())
    ask(samples(2.0))
    ask([*samples(), *samples()])
    ask([{"other": np.full((1, 2), 1.0, np.float32)}])
    ask([{"image": np.full((2, 1), 1.0, np.float32)}])
    ask(samples(), "entropy")
    ask(samples(), "mse", True)
    ask(samples(), "mse", False, "x")
    model.write_bytes(b"another")
    ask(samples())
    model.with_suffix(".data").write_bytes(b"weights")
    ask(samples())
    assert compute.times == 10


def test_numbers_of_numpy_are_kept_exactly(folder: Path, model: Path) -> None:
    third = np.float32(1 / 3)
    first = cache.ranges(model, samples(), "mse", False, lambda: {"x": (-third, third)})
    again = cache.ranges(model, samples(), "mse", False, dict)
    assert again == first == {"x": (-float(third), float(third))}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"x": 1}', b'{"x": [null, 1]}', b'{"x": [1]}', b"\xff"])
def test_a_broken_entry_is_computed_again(folder: Path, model: Path, content: bytes) -> None:
    compute = Observation()
    cache.ranges(model, samples(), "mse", False, compute)
    (entry,) = folder.iterdir()
    entry.write_bytes(content)
    assert cache.ranges(model, samples(), "mse", False, compute) == FOUND
    assert compute.times == 2
    assert json.loads(entry.read_text()) == {name: list(ends) for name, ends in FOUND.items()}


def test_a_folder_that_cannot_be_written_costs_only_time(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.FOLDER, str(model / "below a file"))
    assert cache.ranges(model, samples(), "mse", False, Observation()) == FOUND


def test_the_entries_used_longest_ago_make_room(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "KEPT", 2)
    compute = Observation()

    def ask(value: int) -> None:
        before = set(folder.glob("*")) if folder.exists() else set()
        cache.ranges(model, samples(value), "mse", False, compute)
        for new in set(folder.glob("*")) - before:
            os.utime(new, (value, value))

    ask(1)
    ask(2)
    ask(1)  # used again, and so younger than 2
    ask(3)
    assert len(list(folder.iterdir())) == 2
    ask(1)
    assert compute.times == 3
    ask(2)
    assert compute.times == 4
