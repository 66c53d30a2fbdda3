"""Latencies on an NVIDIA GPU: an engine against PyTorch, its compiler, and ONNX Runtime's CUDA provider.

Not run on hardware: the machine that this was written on has no GPU.
"""

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch

from mobilemix.api import deploy, prepare
from mobilemix.errors import MobilemixError, first_line
from mobilemix.models.registry import MODELS
from mobilemix.recipe import Recipe
from mobilemix.targets.tensorrt.bindings import missing_gpu
from mobilemix.targets.tensorrt.builder import can_build
from mobilemix.targets.tensorrt.engine import EngineRunner
from mobilemix.targets.tensorrt.rtx import RtxRunner

BATCHES = (1, 64)
WARM_UP, RUNS = 20, 100
CUDA = "CUDAExecutionProvider"
HEADINGS = ("model", "batch", "PyTorch eager", "torch.compile", "ONNX Runtime CUDA", "TensorRT", "TensorRT for RTX")


def missing() -> str | None:
    """Why nothing can be measured here, or None."""
    return missing_gpu() or (None if torch.cuda.is_available() else "PyTorch has no CUDA")


def device() -> str:
    """The GPU's name, and what ran on it."""
    return f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, ONNX Runtime {ort.__version__}"


def measure(name: str, weights: Path, folder: Path) -> list[tuple[str, ...]]:
    """A row for each batch."""
    return [(name, str(batch), *_row(name, weights, batch, folder / str(batch))) for batch in BATCHES]


def _row(name: str, weights: Path, batch: int, folder: Path) -> list[str]:
    shape = (batch, 3, *[MODELS[name].input_size] * 2)
    given = {"model": name, "weights": weights, "input_shapes": (shape,)}
    prepared = prepare(Recipe(**given))
    x = np.random.default_rng(0).standard_normal(shape, np.float32)
    module, image = copy.deepcopy(prepared.source.module).half().cuda(), torch.from_numpy(x).half().cuda()

    def deployed(target: str) -> Path:
        return deploy(prepared, Recipe(**given, target=target, precision="fp16"), folder / target).path

    routes: tuple[Callable[[], float], ...] = (
        lambda: _torch(module, image),
        lambda: _torch(torch.compile(module, mode="max-autotune"), image),
        lambda: _onnx(deployed("onnx"), x),
        lambda: _engine("tensorrt", deployed, x),
        lambda: _engine("tensorrt-rtx", deployed, x),
    )
    return [_cell(route) for route in routes]


def _cell(route: Callable[[], float]) -> str:
    """Milliseconds, or what is in the way of them."""
    try:
        return f"{route():.3f}"
    except Exception as error:
        return first_line(error)


def _torch(module: torch.nn.Module, image: torch.Tensor) -> float:
    with torch.inference_mode():
        return _median(lambda: module(image), torch.cuda.synchronize)


def _onnx(path: Path, x: np.ndarray) -> float:
    session = ort.InferenceSession(path, providers=[CUDA])
    if CUDA not in session.get_providers():
        raise MobilemixError("not installed")
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, ort.OrtValue.ortvalue_from_numpy(x, "cuda", 0))
    binding.bind_output(session.get_outputs()[0].name, "cuda")
    return _median(lambda: session.run_with_iobinding(binding), binding.synchronize_outputs)


def _engine(target: str, deployed: Callable[[str], Path], x: np.ndarray) -> float:
    if reason := can_build(target):
        raise MobilemixError(reason)
    engine = deployed(target).with_suffix(".engine")
    if target == "tensorrt-rtx":
        runner = RtxRunner(engine)  # copies the input and output, which the other routes do not
        return _median(lambda: runner.run({"image": x}), lambda: None)
    return statistics.median(EngineRunner(engine).latencies({"image": x}, WARM_UP + RUNS)[WARM_UP:])


def _median(run: Callable[[], object], wait: Callable[[], object]) -> float:
    """Milliseconds from call to result, after a warm-up."""
    found = []
    for _ in range(WARM_UP + RUNS):
        wait()
        start = time.perf_counter()
        run()
        wait()
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found[WARM_UP:])
