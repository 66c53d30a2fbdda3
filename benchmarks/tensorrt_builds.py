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
    """Build, measure, and print or write the tables."""
    import tensorrt_latencies
    from test_backbones import ARCHITECTURES, checkpoint

    names = sys.argv[1:] or ARCHITECTURES
    rows = head(HEADINGS)
    print(*map(line, rows), sep="\n", flush=True)
    builders: set[str] = set()
    latencies = head(tensorrt_latencies.HEADINGS)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            weights = checkpoint(name, Path(folder))
            for row in builds(name, weights, Path(folder) / name, builders):
                rows.append(row)
                print(line(row), flush=True)
        reason = tensorrt_latencies.missing()
        for name in () if reason else names:
            for row in tensorrt_latencies.measure(name, Path(folder) / f"{name}.safetensors", Path(folder) / "gpu"):
                latencies.append(row)
                print(line(row), flush=True)
    if not sys.argv[1:]:
        text = HEADER.format(
            builders=", ".join(sorted(builders)),
            machine=f"{platform.machine()}, Python {platform.python_version()}",
            builds="\n".join(map(line, rows)),
            latencies=NOT_RUN.format(reason=reason) if reason else measured(latencies),
        )
        (ROOT / "docs" / "tensorrt_builds.md").write_text(text, encoding="utf-8")


def builds(name: str, weights: Path, folder: Path, builders: set[str]) -> list[tuple[str, ...]]:
    """A row for each precision of a model; what built them is added to `builders`."""
    from mobilemix.api import deploy, prepare
    from mobilemix.errors import MobilemixError
    from mobilemix.recipe import Recipe
    from mobilemix.targets.tensorrt.builder import BuildOptions, build

    prepared = prepare(Recipe(model=name, weights=weights))
    rows = []
    for precision in PRECISIONS:
        recipe = Recipe(model=name, weights=weights, target=TARGET, precision=precision)
        try:
            done = deploy(prepared, recipe, folder / precision)
        except MobilemixError as error:
            rows.append((name, precision, f"failed: {error}", *[""] * (len(HEADINGS) - 3)))
            continue
        engine, log = done.path.with_suffix(".engine"), done.path.with_suffix(".log")
        again = [build(done.path, engine, log, TARGET, BuildOptions()) for _ in range(REPETITIONS)]
        builders.add(again[0].builder)
        layers = Counter(layer.precision for layer in again[0].layers)
        agreement = done.parity.agreement.values()
        rows.append(
            (
                name,
                precision,
                f"{done.path.stat().st_size / 1e6:.2f}",
                f"{again[0].bytes / 1e6:.2f}",
                f"{min(one.seconds for one in again):.1f}",
                ", ".join(f"{count} {kind}" for kind, count in layers.most_common()),
                f"{max(one.relative_l2 for one in agreement):.1e}",
                f"{min(one.top1 for one in agreement):.0%}",
            )
        )
    return rows


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

Made by `python benchmarks/tensorrt_builds.py` with {builders} ({machine}).

## Builds

Parsed and built ahead of time by TensorRT for RTX, which needs no GPU, for compute capability 8.0 and later. TensorRT
itself has the same ONNX parser, and builds for one GPU by timing kernels on it, so its sizes and seconds differ.

`build s` is the builder alone, the fastest of three. `layers` counts the parsed network's layers by the type they
compute in: a strongly typed network runs in the types that the ONNX file says. A convolution or matrix product of
dequantised operands counts as int8, and so do the quantisations themselves; the dequantisations count as what they
return. Constants and arithmetic on shapes are left out. `relative L2` and `top-1` compare the ONNX file, executed by
ONNX Runtime on the CPU with the same casts, with the source in float64: the worst of two noise inputs and five
photographs. Weights are generated, as in [exports.md](exports.md), so top-1 is agreement with PyTorch and nothing else.

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
