"""Accuracy, size and latency of quantised files: classifiers of the four families × precisions × observers.

    python benchmarks/quantization.py --data flowers \\
        --checkpoint casvit_xs=casvit_xs.safetensors@160 --checkpoint efficientvim_m1=efficientvim_m1.safetensors@224 \\
        --checkpoint dualtoken_vit_tiny=dualtoken_vit_tiny.safetensors@160

The shipped classifier is always among them. Others are trained with `examples/train_flowers.py` on the same pictures,
and the number behind @ is their image size. `flowers` holds `train/CLASS/*.jpg`, of which ranges are calibrated, and
`val/CLASS/*.jpg`, on which accuracy is measured. Prints the tables, and writes docs/quantization_results.md once there
is every row of a model of each family. Latencies are of ONNX Runtime on the CPU, turn by turn with the float32 file;
run it on a machine with nothing else to do.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnxruntime as ort
from forms import ratio

from mobilemix import api
from mobilemix.errors import MobilemixError
from mobilemix.files import size
from mobilemix.models.registry import MODELS
from mobilemix.preprocess import Preprocess
from mobilemix.quantization.options import OBSERVERS, Quantization
from mobilemix.recipe import DEFAULT_MODEL, Precision, Recipe
from mobilemix.targets import find_target
from mobilemix.threads import spread

ROOT = Path(__file__).parents[1]
MAX_DROP = 0.003
"""Of top-1, in the rows of mixed precision."""
SECONDS = 2.0
TIMED: tuple[Precision, ...] = ("fp32", "int8")
LATENCIES = ("affnet_t", "casvit_xs", "efficientvim_m1", "dualtoken_vit_tiny")
LATENCY_HEADINGS = ("model", "side", "precision", "1 thread", "2 threads", "time by operator, %")
PROFILED = 20
"""Runs of which the operators' times are added up."""
SHOWN = 5
"""Of turns of a file and the float32 one."""
THREADS = (1, 2)
MINIMUM_IOS = {"int8": 17, "w4": 18}
FAMILIES = {spec.family.title for spec in MODELS.values()}
HEADINGS = ("target", "precision", "how", "MB", "top-1 %", "against fp32", "same answer %", "1 thread", "2 threads")


@dataclass(frozen=True)
class Row:
    """One file to make: a precision of a target, and how it is quantised."""

    target: str
    precision: Precision
    how: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    mixed: bool = False

    @property
    def name(self) -> str:
        """Of all that tells it from other rows."""
        return " ".join(filter(None, (self.target, self.precision, self.how)))


ROWS = (
    Row("onnx", "fp32"),
    Row("onnx", "fp16"),
    *(Row("onnx", "int8", name, (("observer", name),)) for name in OBSERVERS),
    Row("onnx", "int8", "cross-layer equalisation", (("equalization", "cross-layer"),)),
    Row("onnx", "int8", "smooth", (("equalization", "smooth"),)),
    Row("onnx", "int8", "bias correction", (("bias_correction", True),)),
    Row("onnx", "int8", "adaround", (("rounding", "adaround"),)),
    Row("onnx", "int8", "u8s7", (("format", "u8s7"),)),
    Row("onnx", "int8", "s8s8", (("format", "s8s8"),)),
    Row("onnx", "int8", "mixed", mixed=True),
    Row("onnx", "int8-dynamic"),
    Row("onnx", "w8"),
    Row("onnx", "w4"),
    Row("coreml", "fp16"),
    Row("coreml", "int8"),
    Row("coreml", "w8"),
    Row("coreml", "palette8"),
    Row("coreml", "palette6"),
    Row("coreml", "palette4"),
    Row("coreml", "w4"),
)


@dataclass(frozen=True)
class Classifier:
    """A model of the registry with weights for the pictures' classes."""

    model: str
    weights: Path | None = None
    size: int | None = None

    def recipe(self, row: Row, data: Path) -> Recipe:
        """What makes one row's file."""
        options = {"data": str(data / "train"), **dict(row.options)} if row.precision == "int8" else dict(row.options)
        return Recipe(
            model=self.model,
            weights=self.weights,
            target=row.target,
            precision=row.precision,
            input_shapes=((1, 3, self.size, self.size),) if self.size else (),
            minimum_ios=MINIMUM_IOS.get(row.precision, 16),
            quantization=Quantization(**options),
        )


Result = dict[str, Any]
"""Of one row: `error`, or `megabytes`, the class that each picture is given, and the `latency` by number of threads."""


def pictures(folder: Path) -> tuple[list[Path], np.ndarray]:
    """Files of `folder/CLASS/`, and the number of the class of each."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [(path, number) for number, name in enumerate(classes) for path in sorted(name.iterdir())]
    return [path for path, _ in found], np.array([number for _, number in found])


def measure(classifier: Classifier, rows: list[Row], data: Path, folder: Path) -> Iterator[tuple[str, Result]]:
    """Make every file, ask it for all pictures, and time those that ONNX Runtime runs."""
    files, _ = pictures(data / "val")
    prepared = api.prepare(classifier.recipe(ROWS[0], data))
    preprocess: Preprocess | None = prepared.source.preprocess
    assert preprocess is not None
    (name,) = prepared.lowered.input_names
    views = [{name: view} for view in spread(preprocess, files)]
    base = make(ROWS[0], classifier.recipe(ROWS[0], data), prepared, data, folder / "base")
    for row in rows:
        try:
            path = make(row, classifier.recipe(row, data), prepared, data, folder / row.name.replace(" ", "-"))
        except MobilemixError as error:
            yield row.name, {"error": str(error)}
            continue
        answers = spread(find_target(row.target).load(path).run, views)
        classes = [int(answer["logits"].argmax()) for answer in answers]
        timed = THREADS if row.target == "onnx" and row != ROWS[0] else ()
        latency = {str(threads): speedup(path, base, threads) for threads in timed}
        yield row.name, {"megabytes": size(path) / 1e6, "classes": classes, "latency": latency}


def make(row: Row, recipe: Recipe, prepared: api.Prepared, data: Path, output: Path) -> Path:
    """The file of one row."""
    if not row.mixed:
        return api.deploy(prepared, recipe, output).path
    given: dict[str, Any] = {"model": recipe.model, "weights": recipe.weights, "input_shapes": recipe.input_shapes}
    given |= {"target": recipe.target, "precision": recipe.precision, "quantization": recipe.quantization}
    return api.quantize(**given, data=data / "val", max_drop=MAX_DROP, output=output).export.path


def speedup(path: Path, base: Path, threads: int) -> str:
    """How many times faster than another file ONNX Runtime runs one, and its milliseconds."""
    sessions = [session(each, threads) for each in (path, base)]
    feed = noise(sessions[0])
    seconds: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        for opened, taken in zip(sessions, seconds, strict=True):
            began = time.perf_counter()
            opened.run(None, feed)
            taken.append(time.perf_counter() - began)
    middle, low, high = ratio(*(each[len(each) // 10 :] for each in seconds))
    return f"{middle:.2f} ({low:.2f}–{high:.2f}) {1e3 * float(np.median(seconds[0])):.1f} ms"


def session(path: Path, threads: int, profile: Path | None = None) -> ort.InferenceSession:
    """A file in ONNX Runtime; its threads sleep between runs, in which those of another session would wait for them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def noise(opened: ort.InferenceSession) -> dict[str, np.ndarray]:
    """Its only input."""
    (value,) = opened.get_inputs()
    return {value.name: np.random.default_rng(0).standard_normal(value.shape, np.float32)}


def shares(path: Path, folder: Path) -> str:
    """The operators that take most of a file's time on one thread, in per cent."""
    opened = session(path, 1, folder / "profile")
    for _ in range(PROFILED):
        opened.run(None, noise(opened))
    events = json.loads(Path(opened.end_profiling()).read_text())
    taken: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            taken[event["args"]["op_name"]] += event["dur"]
    return ", ".join(f"{name} {100 * part / taken.total():.0f}" for name, part in taken.most_common(SHOWN))


def latencies(model: str, folder: Path) -> Iterator[tuple[str, ...]]:
    """Lines of the table of latencies of one model at the size of its paper, with generated weights."""
    weights = None if MODELS[model].weights else Path(exports.checkpoint(model, folder))
    prepared = api.prepare(Recipe(model=model, weights=weights, target="onnx"))
    paths = {}
    for precision in TIMED:
        recipe = Recipe(model=model, weights=weights, target="onnx", precision=precision)
        paths[precision] = api.deploy(prepared, recipe, folder / model / precision).path
    for precision, path in paths.items():
        times = ["–", "–"]
        if precision != TIMED[0]:
            times = [speedup(path, paths[TIMED[0]], threads) for threads in THREADS]
        yield model, str(prepared.source.input_shapes[0][-1]), precision, *times, shares(path, folder)


def cells(row: Row, results: dict[str, Result], labels: np.ndarray) -> tuple[str, ...]:
    """One line of the table."""
    result, base = (results.get(name, {"error": "not run"}) for name in (row.name, ROWS[0].name))
    if error := result.get("error") or base.get("error"):
        return row.target, row.precision, row.how, "–", "–", str(error), "–", "–", "–"
    answer, expected = np.array(result["classes"]), np.array(base["classes"])
    right, was = answer == labels, expected == labels
    return (
        row.target,
        row.precision,
        row.how,
        f"{result['megabytes']:.2f}",
        f"{100 * right.mean():.1f}",
        f"{100 * (right.mean() - was.mean()):+.1f} (+{(right & ~was).sum()} −{(was & ~right).sum()})",
        f"{100 * (answer == expected).mean():.1f}",
        *(result["latency"].get(str(threads), "–") for threads in THREADS),
    )


def agreement(results: dict[str, Result]) -> str:
    """How many pictures Core ML's W8A8 package and each ONNX int8 file answer alike."""
    package = results.get("coreml int8", {}).get("classes")
    shares = [
        f"{row.how} {100 * np.mean(np.array(package) == np.array(results[row.name]['classes'])):.1f} %"
        for row in ROWS
        if (row.target, row.precision) == ("onnx", "int8") and package and "classes" in results.get(row.name, {})
    ]
    return f"Same answer from Core ML int8 as from ONNX int8: {', '.join(shares)}." if shares else ""


def line(values: tuple[str, ...]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(values)} |"


def section(model: str, results: dict[str, Result], labels: np.ndarray) -> str:
    """Heading, table and agreement of one model."""
    table = [cells(row, results, labels) for row in ROWS if row.name in results]
    lines = [line(each) for each in (HEADINGS, ("---",) * len(HEADINGS), *table)]
    return "\n".join((f"## {model}", "", *lines, "", agreement(results)))


def machine() -> str:
    """What it was measured with."""
    return f"{platform.machine()}, Python {platform.python_version()}, ONNX Runtime {ort.__version__}"


def checkpoint(text: str) -> Classifier:
    """Read MODEL=FILE@SIZE."""
    model, _, rest = text.partition("=")
    file, _, side = rest.rpartition("@")
    return Classifier(model, Path(file), int(side))


def main() -> None:
    """Measure, and write or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--checkpoint", type=checkpoint, action="append", default=[], metavar="MODEL=FILE@SIZE")
    parser.add_argument("--only", default="", help="measure the rows whose name contains this")
    parser.add_argument("--latencies", action="store_true", help="measure those at the papers' sizes alone")
    parser.add_argument("--results", type=Path, help="JSON file of rows measured before, which is added to")
    options = parser.parse_args()
    found: dict[str, dict[str, Result]] = {}
    if options.results and options.results.exists():
        found = json.loads(options.results.read_text())
    if options.latencies:
        with tempfile.TemporaryDirectory() as folder:
            found_latencies = [row for model in LATENCIES for row in latencies(model, Path(folder))]
        table = [LATENCY_HEADINGS, ("---",) * len(LATENCY_HEADINGS), *found_latencies]
        text = LATENCY_HEADER.format(machine=machine(), table="\n".join(map(line, table)))
        (ROOT / "docs" / "quantization_latencies.md").write_text(text, encoding="utf-8")
        return
    rows = [row for row in ROWS if options.only in row.name]
    with tempfile.TemporaryDirectory() as folder:
        for classifier in (Classifier(DEFAULT_MODEL), *options.checkpoint):
            results = found.setdefault(classifier.model, {})
            for name, result in measure(classifier, rows, options.data, Path(folder, classifier.model)):
                results[name] = result
                print(classifier.model, name, {**result, "classes": "…"}, file=sys.stderr, flush=True)
                if options.results:
                    options.results.write_text(json.dumps(found))
    _, labels = pictures(options.data / "val")
    tables = "\n\n".join(section(model, results, labels) for model, results in found.items())
    print(tables)
    if len(found) == len(FAMILIES) and all(row.name in results for results in found.values() for row in ROWS):
        text = HEADER.format(machine=machine(), tables=tables)
        (ROOT / "docs" / "quantization_results.md").write_text(text, encoding="utf-8")


HEADER = """# Quantisation: accuracy, size and latency

Written by `python benchmarks/quantization.py` ({machine}).

Classifiers of five flowers, one of each family. AFFNet-ET is the one that ships; the others were trained with
`examples/train_flowers.py --minutes 68` on the same pictures, side by side on two cores (EfficientViM-M1 with
`--size 192 --eval-size 224 --lr 1e-3`), and are less accurate than they could be. Ranges are calibrated on 128 training
pictures. Accuracy is on the validation pictures, with how many the file gets right that the float32 file gets wrong
(+), and the other way round (−). Layers of mixed precision were chosen on the same validation pictures, for a loss of
at most 0.3 %. Core ML packages are executed by mobilemix's interpreter; latencies are of ONNX Runtime: how many times
faster than its float32 file, with the 95 % interval, and milliseconds.

{tables}
"""

LATENCY_HEADER = """# Quantised ONNX files: latency

Written by `python benchmarks/quantization.py --latencies` ({machine}).

ONNX Runtime on the CPU, images of the size of the papers, batch 1: how many times faster than the float32 file, turn
by turn with it, with the 95 % interval, and milliseconds. Weights are generated (`tests/models_checks.py`). The last
column says where a file spends its time on one thread.

{table}
"""

if __name__ == "__main__":
    main()
