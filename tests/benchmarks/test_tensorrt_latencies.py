import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import tensorrt_latencies

from mobilemix.errors import TargetError


def test_without_a_gpu_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_latencies, "missing_gpu", lambda: "no NVIDIA driver")
    assert tensorrt_latencies.missing() == "no NVIDIA driver"
    monkeypatch.setattr(tensorrt_latencies, "missing_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tensorrt_latencies.missing() == "PyTorch has no CUDA"


def test_what_cannot_be_measured_says_why_in_its_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> float:
        raise TargetError("no room\nat all")

    assert tensorrt_latencies._cell(fails) == "no room"
    assert tensorrt_latencies._cell(lambda: 1.25) == "1.250"
    monkeypatch.setattr(tensorrt_latencies, "can_build", lambda target: f"{target} is not here")
    route = lambda: tensorrt_latencies._engine("tensorrt", lambda target: Path(), np.zeros(1))  # noqa: E731
    assert tensorrt_latencies._cell(route) == "tensorrt is not here"


def test_warm_up_is_run_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter(range(10_000))
    monkeypatch.setattr(tensorrt_latencies.time, "perf_counter", lambda: next(clock) / 1e3)
    assert tensorrt_latencies._median(lambda: calls.append("run"), lambda: calls.append("wait")) == pytest.approx(1.0)
    assert calls == ["wait", "run", "wait"] * (tensorrt_latencies.WARM_UP + tensorrt_latencies.RUNS)
