"""Why mobilemix exists: one model with FFTs, through the stock exporters and through mobilemix.

    python benchmarks/why.py [MODEL] [--rounds N]

Prints what coremltools says of the unmodified model, and latencies of PyTorch eager, of `torch.onnx.export`'s file and
of mobilemix's, both in ONNX Runtime, batch 1, interleaved round by round in one process: medians and ratios.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

import mobilemix
from mobilemix.models.registry import MODELS
from mobilemix.source import load_source

THREADS = 2


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="affnet_t", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=60)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    module = load_source(mobilemix.Recipe(model=arguments.model)).module
    size = MODELS[arguments.model].input_size
    x = torch.randn(1, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "PyTorch eager": eager(module, x),
            "torch.onnx.export → ONNX Runtime": stock(module, x, Path(folder)),
            "mobilemix → ONNX Runtime": ours(arguments.model, x, Path(folder)),
        }
        milliseconds = interleave(runs, arguments.rounds)
    best = statistics.median(milliseconds["mobilemix → ONNX Runtime"])
    print(f"| {arguments.model}, {size} × {size}, {THREADS} threads | median ms | against mobilemix |")
    print("| --- | --- | --- |")
    for name, times in milliseconds.items():
        print(f"| {name} | {statistics.median(times):.1f} | {statistics.median(times) / best:.2f} × |")
    print(f"| coremltools alone | refused: {coremltools_says(module, x)} | |")


def eager(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """The model as it is."""

    def run() -> object:
        with torch.inference_mode():
            return module(x)

    return run


def stock(module: nn.Module, x: torch.Tensor, folder: Path) -> Callable[[], object]:
    """PyTorch's own exporter, with its optimiser."""
    path = folder / "stock.onnx"
    with contextlib.redirect_stdout(io.StringIO()):
        torch.onnx.export(module, (x,), path, dynamo=True, verbose=False)
    return session(path, x)


def ours(model: str, x: torch.Tensor, folder: Path) -> Callable[[], object]:
    """What `mobilemix export` writes."""
    return session(mobilemix.export(model, target="onnx", output=folder).path, x)


def session(path: Path, x: torch.Tensor) -> Callable[[], object]:
    """An ONNX file in ONNX Runtime on the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    runtime = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {runtime.get_inputs()[0].name: np.asarray(x)}
    return lambda: runtime.run(None, feed)


def interleave(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds by name; every round runs each once, so that a busy moment hits all of them."""
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 5):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_ >= 5:  # warm
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return milliseconds


def coremltools_says(module: nn.Module, x: torch.Tensor) -> str:
    """The error of a plain coremltools conversion, as one line."""
    import coremltools as ct

    program = torch.export.export(module, (x,), strict=False).run_decompositions({})
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            ct.convert(program, minimum_deployment_target=ct.target.iOS16, skip_model_load=True)
    except Exception as error:  # whatever it is, it is the answer
        return " ".join(str(error).split())[:160]
    return "nothing: it converts"


if __name__ == "__main__":
    main()
