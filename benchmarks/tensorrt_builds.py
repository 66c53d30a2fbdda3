"""Engines of every backbone: what NVIDIA's builder makes of each precision and, on a GPU, how fast it is.

    python benchmarks/tensorrt_builds.py                  # every model; writes docs/tensorrt_builds.md
    python benchmarks/tensorrt_builds.py affnet_et        # some models; prints the tables only

Needs `pip install 'mobilemix[tensorrt-rtx]'`, and no GPU. With one, the second table is measured too. Weights are
generated (`tests/models_checks.py`).
"""

import platform
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mobilemix.api import Export
    from mobilemix.targets.tensorrt.builder import Built

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

TARGET = "tensorrt-rtx"
PRECISIONS = ("fp32", "fp16", "int8")
REPETITIONS = 3
HEADINGS = (
    "model",
    "precision",
    "ONNX MB",
    "engine MB",
    "build s",
    "layers",
    "relative L2",
    "top-1",
)


def main() -> None:
    """Export, build, measure, and print or write the tables."""
    import tensorrt_latencies
    from test_backbones import ARCHITECTURES, checkpoint

    names = sys.argv[1:] or ARCHITECTURES
    rows, latencies = head(HEADINGS), head(tensorrt_latencies.HEADINGS)
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        exports = [each for name in names for each in exported(name, checkpoint(name, folder), folder / name)]
        built = builds([done.path for _, _, done in exports])
        for (name, precision, done), engine in zip(exports, built, strict=True):
            rows.append((name, precision, *figures(done, engine)))
        print(*map(line, rows), sep="\n", flush=True)
        reason = tensorrt_latencies.missing()
        for name in () if reason else names:
            latencies += tensorrt_latencies.measure(name, folder / f"{name}.safetensors", folder / "gpu")
            print(line(latencies[-2]), line(latencies[-1]), sep="\n", flush=True)
    if not sys.argv[1:]:
        text = HEADER.format(
            builder=built[0].builder,
            machine=f"{platform.machine()}, Python {platform.python_version()}",
            builds="\n".join(map(line, rows)),
            latencies=NOT_RUN.format(reason=reason) if reason else measured(latencies),
        )
        (ROOT / "docs" / "tensorrt_builds.md").write_text(text, encoding="utf-8")


def exported(name: str, weights: Path, folder: Path) -> list[tuple[str, str, "Export"]]:
    """A model's exports with the names of their precisions."""
    from mobilemix.api import deploy, prepare
    from mobilemix.recipe import Recipe

    prepared = prepare(Recipe(model=name, weights=weights))
    found = []
    for precision in PRECISIONS:
        recipe = Recipe(model=name, weights=weights, target=TARGET, precision=precision)
        found.append((name, precision, deploy(prepared, recipe, folder / precision)))
        print(f"{name} {precision}: exported", file=sys.stderr, flush=True)
    return found


def builds(models: list[Path]) -> list["Built"]:
    """The fastest build of each, once more and one after the other, of a few."""
    from mobilemix.targets.tensorrt.builder import BuildOptions, build

    def fastest(model: Path) -> "Built":
        engine, log = model.with_suffix(".engine"), model.with_suffix(".log")
        again = [build(model, engine, log, TARGET, BuildOptions()) for _ in range(REPETITIONS)]
        return min(again, key=lambda one: one.seconds)

    return [fastest(model) for model in models]


def figures(done: "Export", built: "Built") -> tuple[str, ...]:
    """The cells of a row after the model's name and its precision."""
    layers = Counter(layer.precision for layer in built.layers)
    agreement = done.parity.agreement.values()
    return (
        f"{done.path.stat().st_size / 1e6:.2f}",
        f"{built.bytes / 1e6:.2f}",
        f"{built.seconds:.1f}",
        ", ".join(f"{count} {precision}" for precision, count in layers.most_common()),
        f"{max(one.relative_l2 for one in agreement):.1e}",
        f"{min(one.top1 for one in agreement):.0%}",
    )


def measured(rows: list[tuple[str, ...]]) -> str:
    """The text and table of the latencies."""
    import tensorrt_latencies

    device, runs = tensorrt_latencies.device(), tensorrt_latencies.RUNS
    return MEASURED.format(device=device, runs=runs, latencies="\n".join(map(line, rows)))


def head(headings: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The first two lines of a Markdown table."""
    return [headings, tuple("---" for _ in headings)]


def line(cells: tuple[str, ...]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


HEADER = """# Every backbone as a TensorRT engine

Made by `python benchmarks/tensorrt_builds.py` with {builder} ({machine}).

## Builds

Parsed and built ahead of time by TensorRT for RTX, which needs no GPU, for compute capability 8.0 and later. TensorRT
itself has the same ONNX parser, and builds for one GPU by timing kernels on it, so its sizes and seconds differ.

`build s` is the builder alone, the fastest of three, on a machine that does other work too. `layers` counts the parsed
network's layers by the type they compute in: a strongly typed network runs in the types that the ONNX file says. A
convolution or matrix product of dequantised operands counts as int8, and so do the quantisations themselves; the
dequantisations count as what they return. Constants and arithmetic on shapes are left out. `relative L2` and `top-1`
compare the ONNX file, executed by ONNX Runtime on the CPU with the same casts, with the source in float64: the worst
of two noise inputs and five photographs (of int8: photographs alone). Weights are generated, as in
[exports.md](exports.md): top-1 is agreement with PyTorch and nothing else, and what int8 costs a trained model is not
seen here. A row whose error is beyond its precision's tolerance (verification.md) is an export that fails, though
NVIDIA's builder takes it. An engine holds the source of its kernels, compiled where it runs; those of int8 are long,
so most engines in int8 are larger than in fp16.

{builds}

## Latencies on a GPU

{latencies}
"""

NOT_RUN = """Not run: {reason} on the machine that made this page. None of these engines has been executed, and no
latency has been measured on a GPU. With one, the same command measures every backbone in fp16 at batch 1 and 64: the
engine, PyTorch eager, `torch.compile`, and ONNX Runtime's CUDA provider."""

MEASURED = """Measured on {device}, in fp16: milliseconds of a batch, medians of {runs} runs. Inputs and outputs are
on the GPU, but for TensorRT for RTX, which copies them. PyTorch runs the source in fp16; ONNX Runtime and the engines
run the rewritten model, with a float32 input and output.

{latencies}"""

if __name__ == "__main__":
    main()
