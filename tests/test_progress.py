from concurrent.futures import ThreadPoolExecutor

import pytest

from mobilemix import progress


@pytest.fixture
def told() -> list[str]:
    return []


def test_work_of_a_moment_tells_its_stage_alone(told: list[str]) -> None:
    with progress.stage("compile", told.append), progress.counting("sample", 3) as step:
        step(3)
    assert told == ["compile"]


def test_longer_work_is_counted_from_any_thread(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    with progress.stage("compile", told.append):
        with progress.counting("sample", 5) as step, ThreadPoolExecutor(2) as pool:
            list(pool.map(step, [2, 2, 2]))  # the last fills up a batch
        assert told == ["compile", *(f"compile · sample {done} of 5" for done in (2, 4, 5)), "compile"]


def test_counts_are_told_now_and_then(told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, progress.PATIENCE - 1, 2.1, 2.1, 2.15, 2.3, 2.3])  # two of each step that is told
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    with progress.stage("compile", told.append), progress.counting("sample", 4) as step:
        for _ in range(4):
            step(1)
    assert told == ["compile", "compile · sample 2 of 4", "compile · sample 4 of 4", "compile"]


def test_nobody_has_to_listen() -> None:
    with progress.counting("sample", 1) as step:
        step(1)
