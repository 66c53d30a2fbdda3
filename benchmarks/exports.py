"""What an export costs and how closely it matches: every backbone × deployment, each in a process of its own.

    python benchmarks/exports.py                  # every model; writes docs/exports.md
    python benchmarks/exports.py affnet_et        # some models; prints the tables only

Seconds are wall time of the whole command, from the start of its process until it is gone: Python's start, imports,
verification and the end of the interpreter included. mobilemix is compiled to bytecode before, as an installer leaves
it. Memory is the peak resident set.
Run it on a machine with nothing else to do. Weights are generated (`tests/models_checks.py`), because fresh ones have
layer scales near zero, under which errors would not show.
"""

import compileall
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

DEPLOYMENTS = (("onnx", "fp32"), ("coreml", "fp16"), ("coreml", "fp32"))
HEADINGS = (
    "model",
    "target",
    "precision",
    "MB",
    "seconds",
    "peak GB",
    "max error",
    "mean error",
    "relative L2",
    "1 − cosine",
    "top-1",
)
STAGES = ("load", "capture", "rewrite", "compile", "verify")
STAGE_HEADINGS = ("model", "target", "precision", "imports, rest", *STAGES, "seconds")


def main() -> None:
    """Export, measure, and print or write the table."""
    from mobilemix.models.registry import MODELS

    names = sys.argv[1:] or list(MODELS)
    compileall.compile_dir(ROOT / "mobilemix", quiet=1)
    rows, stages = head(HEADINGS), head(STAGE_HEADINGS)
    print(*map(line, rows), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            weights = [] if MODELS[name].weights else ["--weights", checkpoint(name, Path(folder))]
            for target, precision in DEPLOYMENTS:
                row, seconds = measure(name, target, precision, weights, folder)
                rows.append(row)
                stages.append(seconds)
                print(line(row), flush=True)
    print("", *map(line, stages), sep="\n", flush=True)
    if not sys.argv[1:]:
        tables = {"table": "\n".join(map(line, rows)), "stages": "\n".join(map(line, stages))}
        text = HEADER.format(machine=machine(), **tables)
        (ROOT / "docs" / "exports.md").write_text(text, encoding="utf-8")


def checkpoint(name: str, folder: Path) -> str:
    """A safetensors file of generated weights."""
    from test_backbones import checkpoint as generate

    return str(generate(name, folder))


def head(headings: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The first two lines of a Markdown table."""
    return [headings, tuple("---" for _ in headings)]


def measure(
    name: str, target: str, precision: str, weights: list[str], folder: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """One row of each table: runs the command line and reads its JSON."""
    arguments = ["export", name, "-t", target, "--precision", precision, "-o", f"{folder}/out", "--json", *weights]
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "mobilemix", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out = process.stdout.read()
    error = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        failed = (name, target, precision, f"failed: {error.strip()}")
        return (*failed, *[""] * (len(HEADINGS) - 4)), (*failed, *[""] * (len(STAGE_HEADINGS) - 4))
    manifest = json.loads(out)[0]["manifest"]
    agreement = manifest["parity"]["agreement"].values()
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    stages = [manifest["seconds"][stage] for stage in STAGES]
    return (
        name,
        target,
        precision,
        f"{manifest['artifact']['bytes'] / 1e6:.2f}",
        f"{seconds:.1f}",
        f"{peak / 1e9:.2f}",
        f"{max(one['max_abs'] for one in agreement):.1e}",
        f"{max(one['mean_abs'] for one in agreement):.1e}",
        f"{max(one['relative_l2'] for one in agreement):.1e}",
        f"{max(0.0, 1 - min(one['cosine'] for one in agreement)):.1e}",
        f"{min(one['top1'] for one in agreement):.0%}",
    ), (name, target, precision, *(f"{each:.1f}" for each in (seconds - sum(stages), *stages, seconds)))


def machine() -> str:
    """What was measured on, in words."""
    import torch

    return (
        f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, torch {torch.__version__}"
    )


def line(cells: tuple[str, ...]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


HEADER = """# Every backbone to every target

Made by `python benchmarks/exports.py` on {machine}.

Each row is one `mobilemix export` in a process of its own: `seconds` is the whole command, from the start of the
process until it is gone, `peak GB` its peak resident memory. Errors are those of the artifact, read back from disk and
executed (ONNX Runtime; the MIL executor), against the float64 source model: the worst of two noise inputs and five
photographs.
Core ML in fp16 is executed with every declared fp16 value rounded; its program and weights are also proven equal to the
fp32 ones, op for op. Weights are generated (normal, of gain 0.7), so top-1 is agreement with PyTorch and nothing else.
With a gain of 1, activations grow from layer to layer, and so do rounding errors: EfficientViM-M4 in fp16 is then 0.02
from PyTorch.

{table}

## Where the seconds go

By stage, as the manifest has them; the rest is starting Python, importing torch and the target's compiler, writing, and
the end of the process.
`verify` has the source model in float64 as well; for Core ML in fp16 it has a second conversion, in fp32.

{stages}
"""

if __name__ == "__main__":
    main()
