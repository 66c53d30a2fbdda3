"""What the stock exporters do with models of FFTs and state-space scans today, and what mobilemix does.

    python benchmarks/zoo.py                  # the whole zoo; writes docs/zoo.md
    python benchmarks/zoo.py gfnet mamba      # some models; prints the tables only

Every export runs in a process of its own, with a time limit, so that a crash or an endless one is a row like any other.
Latencies are those of ONNX Runtime, batch 1, stock file and ours interleaved round by round: medians.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

THREADS = 2
TIME_LIMIT_SECONDS = 300
WRONG = 1e-3
"""A relative error from which an export is said to compute something else."""

SECONDS_OF_ROUNDS = 10.0
Result = dict[str, Any]
"""What one export came to: "error", "nodes" and "seconds"; or "failed" with the reason."""

STOCK_HEADINGS = ("model", "from", "torch.onnx.export", "nodes", "seconds", "coremltools", "operations", "seconds")
OUR_HEADINGS = (
    *("model", "ONNX", "nodes", "seconds", "ms", "stock's ms", "ratio"),
    *("Core ML fp32", "fp16", "operations", "seconds"),
)


def main() -> None:
    """Run, and print or write the tables."""
    from zoo_models import ZOO

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names of the zoo; all of them if left out")
    parser.add_argument("--work", nargs=2, metavar=("ROUTE", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        (name,) = arguments.models
        print(json.dumps(work(arguments.work[0], name, Path(arguments.work[1]))))
        return
    stock, ours = [STOCK_HEADINGS, ("---",) * len(STOCK_HEADINGS)], [OUR_HEADINGS, ("---",) * len(OUR_HEADINGS)]
    for name in arguments.models or ZOO:
        with tempfile.TemporaryDirectory() as folder:
            results = {route: call(route, name, folder) for route in ROUTES}
        stock.append(stock_row(name, results))
        ours.append(our_row(name, results))
        print(line(stock[-1]), line(ours[-1]), sep="\n", flush=True)
    tables = ["\n".join(map(line, rows)) for rows in (stock, ours)]
    if arguments.models:
        print(*tables, sep="\n\n")
    else:
        (ROOT / "docs" / "zoo.md").write_text(document(*tables), encoding="utf-8")


def call(route: str, name: str, folder: str) -> Result:
    """One route of one model, in another process."""
    command = [sys.executable, __file__, name, "--work", route, folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer in {TIME_LIMIT_SECONDS} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return {"failed": f"crashed with {done.returncode}: {last}"}
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return result


def work(route: str, name: str, folder: Path) -> Result:
    """One route of one model, in this process; whatever it raises is the answer."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return ROUTES[route](name, folder)
    except Exception as error:
        return {"failed": f"refused: {reason(error)}"}


def reason(error: BaseException) -> str:
    """The first line of the innermost error."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [text.strip() for text in str(error).splitlines() if text.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def stock_onnx(name: str, folder: Path) -> Result:
    """torch.onnx.export with its optimiser, run in ONNX Runtime."""
    import torch
    from zoo_models import build, sample

    from mobilemix.targets import find_target

    module, inputs, path = build(name, loops=True).requires_grad_(False), sample(name), folder / "stock.onnx"
    start = time.perf_counter()
    torch.onnx.export(module, inputs, path, dynamo=True, verbose=False)
    seconds = time.perf_counter() - start
    nodes = sum(find_target("onnx").op_histogram(path).values())
    run = session(path, name)
    return {"error": relative_error(run(), module, inputs), "nodes": nodes, "seconds": seconds}


def stock_coreml(name: str, folder: Path) -> Result:
    """coremltools from torch.export, else from a trace; executed by mobilemix's interpreter of packages."""
    import coremltools as ct
    import numpy as np
    import torch
    from zoo_models import build, sample

    from mobilemix.targets import find_target

    module, inputs, path = build(name, loops=True).requires_grad_(False), sample(name), folder / "stock.mlpackage"

    def convert(program: Any, **options: Any) -> Any:
        return ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
            **options,
        )

    start = time.perf_counter()
    try:
        with torch.no_grad():
            program = torch.export.export(module, inputs, strict=False).run_decompositions({})
        model, how = convert(program), "exported"
    except Exception as first:
        try:
            types = [
                ct.TensorType(shape=one.shape, dtype=np.float32 if one.is_floating_point() else np.int32)
                for one in inputs
            ]
            with torch.no_grad():
                model, how = convert(torch.jit.trace(module, inputs, check_trace=False), inputs=types), "traced"
        except Exception as second:
            return {"failed": f"refused: {reason(first)}; traced: {reason(second)}"}
    seconds = time.perf_counter() - start
    model.save(str(path))
    target = find_target("coreml")
    result: Result = {"nodes": sum(target.op_histogram(path).values()), "seconds": seconds, "how": how}
    try:
        names = [one.name for one in model.get_spec().description.input]
        answers = target.load(path).run({key: one.numpy() for key, one in zip(names, inputs, strict=True)})
    except Exception as error:
        return {**result, "unknown": reason(error)}
    return {**result, "error": relative_error(list(answers.values()), module, inputs)}


def ours(name: str, folder: Path, target: str, *precisions: str) -> Result:
    """Through mobilemix; seconds without verification, which the stock routes do not have."""
    from zoo_models import build, recipe

    from mobilemix.api import deploy, prepare

    prepared, result = prepare(recipe(name), module=build(name)), {}
    for precision in precisions:
        done = deploy(prepared, recipe(name, target=target, precision=precision), folder)
        stages = done.manifest.seconds
        result[precision] = {
            "error": max(one.relative_l2 for one in done.parity.agreement.values()),
            "passed": done.parity.passed,
            "nodes": sum(done.manifest.artifact["operators"].values()),
            "seconds": sum(seconds for stage, seconds in stages.items() if stage != "verify"),
        }
    return result


def latency(name: str, folder: Path) -> Result:
    """Medians in ms of the stock file and ours, interleaved."""
    from why import interleave

    runs = {"stock": session(folder / "stock.onnx", name), "ours": session(folder / f"{name}.onnx", name)}
    start = time.perf_counter()
    for run in runs.values():
        run()
    rounds = int(SECONDS_OF_ROUNDS / (time.perf_counter() - start))
    times = interleave(runs, min(max(rounds, 10), 200))
    return {key: statistics.median(values) for key, values in times.items()}


ROUTES: dict[str, Callable[[str, Path], Result]] = {
    "stock_onnx": stock_onnx,
    "stock_coreml": stock_coreml,
    "onnx": lambda name, folder: ours(name, folder, "onnx", "fp32"),
    "coreml": lambda name, folder: ours(name, folder, "coreml", "fp32", "fp16"),
    "latency": latency,
}
"""In this order: the last one times what the others wrote."""


def session(path: Path, name: str) -> Callable[[], list[Any]]:
    """An ONNX file in ONNX Runtime on the CPU, with the model's sample."""
    import onnxruntime
    from zoo_models import sample

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    runtime = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {one.name: value.numpy() for one, value in zip(runtime.get_inputs(), sample(name), strict=True)}
    return lambda: runtime.run(None, feed)


def relative_error(found: list[Any], module: Any, inputs: tuple[Any, ...]) -> float:
    """Largest relative L2 error of an output against the module in float64."""
    from mobilemix.parity import reference, relative_l2

    (expected,) = reference(module, [{str(index): one.numpy() for index, one in enumerate(inputs)}]).outputs
    return max(relative_l2(one, other) for one, other in zip(found, expected, strict=True))


def stock_row(name: str, results: dict[str, Result]) -> tuple[str, ...]:
    """What the stock exporters did."""
    from zoo_models import ZOO

    entry = ZOO[name]
    origin = f"{entry.origin}, on loops" if entry.scans else entry.origin
    return (entry.title, origin, *stock_cells(results["stock_onnx"]), *stock_cells(results["stock_coreml"]))


def stock_cells(result: Result) -> tuple[str, str, str]:
    """Verdict, nodes and seconds."""
    if "failed" in result:
        return cut(result["failed"]), "–", "–"
    if "unknown" in result:
        verdict = f"converts; not executed: {cut(result['unknown'])}"
    else:
        verdict = f"{'works' if result['error'] < WRONG else '**wrong**'}, {result['error']:.0e}"
    if result.get("how") == "traced":
        verdict += " (traced)"
    return verdict, str(result["nodes"]), f"{result['seconds']:.1f}"


def our_row(name: str, results: dict[str, Result]) -> tuple[str, ...]:
    """What mobilemix did."""
    from zoo_models import ZOO

    onnx, coreml, times = (results[route] for route in ("onnx", "coreml", "latency"))
    cells = [ZOO[name].title]
    if "failed" in onnx:
        cells += [cut(onnx["failed"]), "–", "–"]
    else:
        cells += [verdict(onnx["fp32"]), str(onnx["fp32"]["nodes"]), f"{onnx['fp32']['seconds']:.1f}"]
    if "failed" in times:
        cells += ["–", "–", "–"]
    else:
        cells += [f"{times['ours']:.2f}", f"{times['stock']:.2f}", f"{times['stock'] / times['ours']:.1f}"]
    if "failed" in coreml:
        cells += [cut(coreml["failed"]), "–", "–", "–"]
    else:
        cells += [verdict(coreml["fp32"]), verdict(coreml["fp16"])]
        cells += [str(coreml["fp16"]["nodes"]), f"{coreml['fp16']['seconds']:.1f}"]
    return tuple(cells)


def verdict(result: Result) -> str:
    """The error, and whether verification passed."""
    return f"{result['error']:.0e}" if result["passed"] else f"**failed**, {result['error']:.0e}"


def cut(text: str) -> str:
    """Short enough for a cell, and with nothing that ends one."""
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= 160 else text[:157] + "…"


def line(cells: tuple[str, ...]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def document(stock: str, ours: str) -> str:
    """The page."""
    import importlib.metadata as metadata

    from exports import machine

    versions = ", ".join(
        f"{name} {metadata.version(name)}"
        for name in ("coremltools", "onnxruntime", "transformers", "neuraloperator", "mambapy")
    )
    return DOCUMENT.format(
        machine=machine(), versions=versions, limit=TIME_LIMIT_SECONDS, threads=THREADS, stock=stock, ours=ours
    )


DOCUMENT = """# The zoo: FFTs and state-space scans through every exporter

Made by `python benchmarks/zoo.py` on {machine}; {versions}.

Small models with seeded random weights at the shapes of real ones: from a package where one exists, else a minimal
implementation written from the paper (`tests/zoo_fourier.py`, `tests/zoo_scans.py`). Each can be exported by name:
`mobilemix export tests/zoo_models.py:gfnet --input 1x3x224x224 -t onnx`. The slow suite exports and verifies them all.

## What the stock exporters do

`torch.onnx.export(dynamo=True)` run in ONNX Runtime, and coremltools from `torch.export` (from `torch.jit.trace` where
that refuses and a trace converts), its package executed by mobilemix's interpreter. The number is the relative L2 error
against the model in float64. Each export had {limit} seconds. A dash: there is none.

Models marked *on loops* import CUDA packages (`mamba_ssm`, `selective_scan_cuda_oflex`), so that without CUDA they do
not even load; the stock exporters were given them with plain loops over time in their place (`tests/zoo_loops.py`).

{stock}

## What mobilemix does

Relative L2 errors against the model in float64 as `mobilemix export` states them; seconds are capture, rewriting and
compilation, without verification; Core ML's are those of one precision. `ms` is ONNX Runtime's median latency with
{threads} threads, `ratio` the stock file's over ours. Core ML in fp16 is executed with every fp16 value rounded.

{ours}
"""

if __name__ == "__main__":
    main()
