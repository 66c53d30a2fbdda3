"""Statistics, tables and the plot of `peers.py`."""

import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
from peers_environments import BASE, ENVIRONMENTS
from peers_routes import PEERS, SGEMM_SIZE

Json = dict[str, Any]

OURS = "mobilemix-onnx"
"""What ratios are to."""

LITERT, SIMPLIFIED, EAGER = "mobilemix-litert", "onnxsim", "eager"
WRONG = 1e-3
"""A relative error from which a peer is said to compute something else."""

RESAMPLES, CONFIDENCE = 2000, 0.95


def milliseconds(row: Json) -> np.ndarray:
    """The median run of every round, in ms."""
    return np.array([1e3 * np.median(times) for times in row["rounds"]])


def ratio(row: Json, base: Json) -> tuple[float, float, float]:
    """Median latency over that of `base`, and the bounds of its confidence interval by resampling rounds of both."""
    pair = np.stack([milliseconds(row), milliseconds(base)])
    picks = np.random.default_rng(0).integers(0, pair.shape[1], (RESAMPLES, pair.shape[1]))
    upper, lower = np.median(pair[:, picks], axis=-1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(upper / lower, [tail, 1 - tail])
    middle = np.median(pair, axis=1)
    return float(middle[0] / middle[1]), float(low), float(high)


def peak(result: Json) -> float:
    """Operations per second of the fastest sgemm of the run."""
    return 2 * SGEMM_SIZE**3 / float(min(min(times) for times in result["sgemm"]))


def ran(row: Json | None) -> bool:
    """Whether it is there, and right."""
    return row is not None and "failed" not in row and row["error"] < WRONG


def best(result: Json, ours: bool) -> str | None:
    """The fastest peer, or the fastest row that mobilemix has a part in."""
    rows = {peer: row for peer, row in result["peers"].items() if PEERS[peer].ours is ours and ran(row)}
    return min(rows, key=lambda peer: float(np.median(milliseconds(rows[peer]))), default=None)


def tables(results: list[Json]) -> str:
    """The summary, and a table for each model."""
    models = dict.fromkeys(result["model"] for result in results)
    parts = [summary(results)]
    for model in models:
        parts.append(f"### {model}")
        parts += [details(result) for result in results if result["model"] == model]
    return "\n\n".join(parts)


SUMMARY = (
    *("model", "threads", "mobilemix → ONNX Runtime", "→ LiteRT", "best peer", "its ms", "best peer ÷ best of ours"),
    *("stock + onnxsim ÷ ONNX Runtime", "÷ best of ours", "eager ÷ ONNX Runtime"),
)


def summary(results: list[Json]) -> str:
    """One row for each model and number of threads; latencies in ms."""
    rows = []
    for result in results:
        peers = result["peers"]
        theirs, ours = best(result, ours=False), best(result, ours=True)
        rows.append(
            (
                result["model"],
                str(result["threads"]),
                latency(peers.get(OURS)),
                latency(peers.get(LITERT)),
                PEERS[theirs].title if theirs else "–",
                latency(peers.get(theirs)),
                versus(peers.get(theirs), peers.get(ours)),
                versus(peers.get(SIMPLIFIED), peers.get(OURS)),
                versus(peers.get(SIMPLIFIED), peers.get(ours)),
                versus(peers.get(EAGER), peers.get(OURS)),
            )
        )
    return table(SUMMARY, rows)


DETAILS = (
    *("{threads} thread(s)", "ms", "÷ mobilemix → ONNX Runtime", "share of sgemm peak", "relative L2"),
    *("peak MB", "load s", "file MB"),
)


def details(result: Json) -> str:
    """Every peer of one model with one number of threads, fastest first."""
    rows = result["peers"]
    order = sorted(rows, key=lambda peer: float(np.median(milliseconds(rows[peer]))) if ran(rows[peer]) else np.inf)
    heading = (f"{result['threads']} thread{'s' * (result['threads'] > 1)}", *DETAILS[1:])
    return table(heading, [detail(peer, rows[peer], result) for peer in order])


def detail(peer: str, row: Json, result: Json) -> tuple[str, ...]:
    """One row; for one that failed, why."""
    title = f"**{PEERS[peer].title}**" if PEERS[peer].ours else PEERS[peer].title
    size = f"{row['bytes'] / 1e6:.1f}" if row.get("bytes") else "–"
    if "failed" in row:
        return (title, f"refused: {cut(row['failed'])}", *["–"] * 5, size)
    median = float(np.median(milliseconds(row)))
    share = 2 * result["macs"] / (1e-3 * median) / peak(result)
    error = f"{row['error']:.0e}" if ran(row) else f"**wrong**, {row['error']:.0e}"
    return (
        title,
        f"{median:.2f}",
        versus(row, result["peers"].get(OURS)),
        f"{share:.0%}",
        error,
        f"{row['peak'] / 1e6:.0f}",
        f"{row['load']:.2f}",
        size,
    )


def latency(row: Json | None) -> str:
    """Median in ms."""
    return f"{np.median(milliseconds(row)):.2f}" if row and ran(row) else "–"


def versus(row: Json | None, base: Json | None) -> str:
    """A ratio and its interval."""
    if not (row and base and "failed" not in row and ran(base)):
        return "–"
    return "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(row, base))


def cut(text: str) -> str:
    """Short enough for a cell, and with nothing that ends one."""
    text = text.replace("|", "\\|").replace("\n", " ")
    return text if len(text) <= 160 else text[:157] + "…"


def table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ("---",) * len(headings), *rows))


BY_HAND = re.compile(r"(?<=<!-- by hand -->\n).*?(?=<!-- end -->)", re.DOTALL)
"""What `write` keeps of the page as it is."""


def write(results: list[Json], folder: Path) -> None:
    """peers.md, peers.json and peers.svg in the folder of documents."""
    page = folder / "peers.md"
    kept = BY_HAND.search(page.read_text(encoding="utf-8")) if page.exists() else None
    text = DOCUMENT.format(
        machine=machine(results),
        packages=packages(),
        rounds=min(len(row["rounds"]) for result in results for row in result["peers"].values() if ran(row)),
        summary=summary(results),
        transforms=transforms(results),
        wins=wins(results),
        by_hand=kept.group() if kept else "",
        details=tables(results).split("\n\n", 1)[1],
    )
    page.write_text(text, encoding="utf-8")
    lines = ",\n".join(json.dumps(one) for one in digest(results))
    (folder / "peers.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    plot(results, folder / "peers.svg")


def digest(results: list[Json]) -> list[Json]:
    """One record for each row of the tables: its figures, without the samples."""
    records = []
    for result in results:
        for peer, row in result["peers"].items():
            record = {"model": result["model"], "threads": result["threads"], "peer": peer}
            record |= {key: row[key] for key in ("failed", "error", "peak", "load", "bytes") if key in row}
            if "failed" not in row:
                record["ms"] = round(float(np.median(milliseconds(row))), 3)
                if ran(result["peers"].get(OURS)):
                    record["ratio"] = [round(one, 3) for one in ratio(row, result["peers"][OURS])]
            records.append(record)
    return records


def machine(results: list[Json]) -> str:
    """What was measured on, in words."""
    peaks = {result["threads"]: peak(result) for result in results}
    best = {n: max(peak(one) for one in results if one["threads"] == n) for n in peaks}
    gigaflops = " and ".join(f"{value / 1e9:.0f} with {n}" for n, value in sorted(best.items()))
    return (
        f"{os.cpu_count()} cores ({processor()}), Python {platform.python_version()}; "
        f"sgemm of {SGEMM_SIZE}² reaches {gigaflops} thread(s), in 10⁹ operations a second"
    )


def processor() -> str:
    """The kind of processor, as far as the system says."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0] if names else platform.machine()


def packages() -> str:
    """What is installed in each environment."""
    rows = [("all", ", ".join(BASE))]
    for name, requirements in ENVIRONMENTS.items():
        pins = [one for one in requirements if "==" in one]
        rows.append((name, ", ".join([*pins, *(["mobilemix"] if len(pins) < len(requirements) else [])])))
    return table(("environment", "packages"), rows)


def wins(results: list[Json]) -> str:
    """A line for each place where something that is not ours is the fastest."""
    lines = []
    for result in results:
        theirs, ours = best(result, ours=False), best(result, ours=True)
        if theirs is None or ours is None:
            continue
        middle, low, high = ratio(result["peers"][ours], result["peers"][theirs])
        if middle > 1:
            certainty = "" if low > 1 else ", within the interval of equal"
            lines.append(
                f"- {result['model']}, {result['threads']} thread(s): {PEERS[theirs].title} is {middle:.2f} × "
                f"[{low:.2f}, {high:.2f}] as fast as {PEERS[ours].title}{certainty}."
            )
    return "\n".join(lines) or "Nowhere in this run."


def transforms(results: list[Json]) -> str:
    """Ratios for the models with FFTs, which most peers refuse."""
    rows = [
        (
            result["model"],
            str(result["threads"]),
            *(versus(result["peers"].get(peer), result["peers"].get(OURS)) for peer in TRANSFORMING),
        )
        for result in results
        if "matmuls" in result["peers"]
    ]
    return table(("model", "threads", *(f"{PEERS[peer].title} ÷ ours" for peer in TRANSFORMING)), rows)


TRANSFORMING = ("onnxruntime", "onnxsim", "matmuls", "eager")


def plot(results: list[Json], path: Path) -> None:
    """Latency over that of mobilemix in ONNX Runtime: a row for each model, a panel for each number of threads."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "peers", "font.size": 9})
    models, threads = list(dict.fromkeys(r["model"] for r in results)), sorted({r["threads"] for r in results})
    figure, axes = plt.subplots(
        1, len(threads), figsize=(1 + 4.2 * len(threads), 1.4 + 0.3 * len(models)), sharey=True, squeeze=False
    )
    for axis, number in zip(axes[0], threads, strict=True):
        axis.axvline(1, color="black", linewidth=1)
        for index, (peer, marker) in enumerate(MARKERS.items()):
            points = [
                (ratio(result["peers"][peer], result["peers"][OURS])[0], models.index(result["model"]))
                for result in results
                if result["threads"] == number and ran(result["peers"].get(peer)) and ran(result["peers"].get(OURS))
            ]
            style = {"color": f"C{index}", "marker": marker, "s": 28, "linewidths": 0.8, "zorder": 2}
            axis.scatter(*zip(*points, strict=True) if points else ([], []), label=PEERS[peer].title, **style)
        axis.set_xscale("log")
        limits = axis.get_xlim()
        axis.set_xticks(TICKS, [f"{value:g}×" for value in TICKS])
        axis.minorticks_off()
        axis.set_xlim(*limits)
        axis.set_yticks(range(len(models)), models)
        axis.set_title(f"{number} thread{'s' * (number > 1)}")
        axis.grid(axis="y", color="0.9", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].invert_yaxis()
    figure.supxlabel("latency ÷ that of mobilemix → ONNX Runtime (line); left of it is faster", fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=4, frameon=False, fontsize=8, bbox_to_anchor=(0.5, 0))
    figure.savefig(path, bbox_inches="tight", facecolor="white", metadata={"Date": None})  # white: legible on dark too
    plt.close(figure)


TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8)
MARKERS = {
    "eager": "o",
    "compile": "s",
    "onnxruntime": "^",
    "onnxsim": "v",
    "matmuls": "<",
    "openvino": "D",
    "ncnn": "P",
    "litert": "X",
    "executorch": "p",
    "mobilemix-litert": "*",
}

DOCUMENT = """# Every backbone in every runtime

Made by `python benchmarks/peers.py` on {machine}.

Latencies are of one image, float32, from an array to an array. Each runtime × model × number of threads is a process
in the peer's own environment, pinned to as many cores as threads and stopped whenever it is not its turn; turns are
blocks of runs, in {rounds} rounds of random order. `ms` is the median over rounds of a round's median. A ratio is of
such medians, and its interval holds 95 % of the ratios of resampled rounds: above 1, the row is slower than ours.

All outputs are compared with the model in float64 (`relative L2`); a peer that computes something else, or that cannot
take the model, is a row that says so. `share of sgemm peak` counts the multiply-adds that papers count (`mobilemix
models`), FFTs none, against the fastest product of two matrices of the same run. `peak MB` is the process's largest
resident memory, Python included; `load s` is from import to first answer. Weights are generated, as in
[exports.md](exports.md), which has the seconds that an export takes.

## Summary

Milliseconds; the best of ours is the fastest row that mobilemix has a part in.

{summary}

![Latency of each peer over that of mobilemix in ONNX Runtime](peers.svg)

### Models with FFTs

{transforms}

### Where a peer is faster

{wins}

<!-- by hand -->
{by_hand}<!-- end -->

## Every peer

Rows in bold are ours. Fastest first.

{details}

## Packages

Each environment sees torch and NumPy of a shared one, and has its own of everything else.

{packages}
"""
