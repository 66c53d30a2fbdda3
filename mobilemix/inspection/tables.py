"""Reports as tables for a terminal."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from rich import markup
from rich.table import Table

from mobilemix.inspection.report import ArtifactReport, Contributor, Cost, ModelReport, Obstacle, Share, Value

Line = str | Table
"""Text with rich's markup, or a table."""

CONTRIBUTORS = 10
PLACES = 3
"""How many modules, and how many lines of the user's source for one obstacle, a table lists; JSON has all."""


def describe(report: ModelReport | ArtifactReport) -> Iterator[Line]:
    """What to print, from top to bottom."""
    yield from _model(report) if isinstance(report, ModelReport) else _artifact(report)


def _model(report: ModelReport) -> Iterator[Line]:
    yield f"[bold]{escape(report.model)}[/] · {report.parameters / 1e6:.2f} M parameters · {report.weights} weights"
    yield _signature(report.inputs, report.outputs)
    for target in report.targets:
        yield ""
        if target.obstacles:
            yield f"[bold]{target.target}[/]: with {target.exporter} alone, in the way"
            yield _obstacles(target.obstacles)
        else:
            yield f"[bold]{target.target}[/]: {target.exporter} takes every operator"
        if report.refusal is not None:
            yield "  [red]blocked[/]: mobilemix's passes stop, see below"
        elif target.remaining:
            yield "  [red]blocked[/] after mobilemix's passes too; write these with other operators:"
            yield _obstacles(target.remaining)
        else:
            yield "  [green]nothing is in the way[/] after mobilemix's passes"
    if report.refusal is not None:
        yield ""
        yield f"[red]mobilemix's passes stop[/]: {escape(report.refusal)}"
    yield ""
    yield _costs({"captured": report.before, "after the passes": report.after})
    yield ""
    yield _contributors(report.contributors[:CONTRIBUTORS])


def _artifact(report: ArtifactReport) -> Iterator[Line]:
    yield f"[bold]{escape(report.path)}[/] · {report.form} · {report.bytes / 1e6:.2f} MB"
    yield _signature(report.inputs, report.outputs)
    stored = ", ".join(f"{dtype} {_size(size)}" for dtype, size in report.weight_dtypes.items())
    yield f"weights: {stored or 'none'}"
    for name, part in report.precisions.items():
        computed = _scaled(part.multiply_adds, 1e6, "M")
        yield f"in {name}: {part.layers} layers, {computed} multiply-adds"
    yield ""
    if report.obstacles:
        yield "what other runtimes do not take"
        yield _obstacles(report.obstacles)
    else:
        yield "[green]nothing in it is known to stop a runtime[/]"
    yield ""
    yield _costs({"the graph": report.cost})
    yield ""
    if report.provenance is None:
        yield "no provenance: not made by mobilemix, or before it wrote one"
    else:
        yield from _provenance(report.provenance)


def _signature(inputs: tuple[Value, ...], outputs: tuple[Value, ...]) -> Table:
    table = _table("", "name", "dtype", "shape")
    for kind, values in (("in", inputs), ("out", outputs)):
        for value in values:
            shape = "×".join("?" if size is None else str(size) for size in value.shape)
            table.add_row(kind, escape(value.name), value.dtype, escape(shape) or "scalar")
    return table


def _obstacles(obstacles: tuple[Obstacle, ...]) -> Table:
    """Without the last columns where they are empty, as for artifacts, which know no passes and no source."""
    rows = [
        (
            f"  {escape(one.operator)}",
            str(one.count),
            one.stops,
            escape(one.reason),
            one.handled_by or "",
            _places(one.places),
        )
        for one in obstacles
    ]
    headings = ("  operator", "count", "for", "reason", "handled by", "asked for at")
    shown = [index for index in range(len(headings)) if any(row[index] for row in rows)]
    table = _table(*(headings[index] for index in shown))
    for row in rows:
        table.add_row(*(row[index] or "–" for index in shown))
    return table


def _places(places: tuple[str, ...]) -> str:
    lines = [escape(_short(place)) for place in places[:PLACES]]
    more = len(places) - PLACES
    return "\n".join([*lines, f"… and {more} more"] if more > 0 else lines)


def _short(place: str) -> str:
    """The file relative to the working directory, where it is below."""
    return place.removeprefix(f"{Path.cwd()}/")


def _costs(columns: Mapping[str, Cost | None]) -> Table:
    """One column for each graph: totals, then every operator."""
    costs = list(columns.values())
    table = _table("", *columns, justify="right")
    operators = dict.fromkeys(name for cost in costs if cost for name in cost.operators)
    for label, cells in (
        ("operators", [cost and str(sum(cost.operators.values())) for cost in costs]),
        ("multiply-adds", [cost and _scaled(cost.multiply_adds, 1e6, "M") for cost in costs]),
        ("weights", [cost and f"{cost.weights / 1e6:.3f} M, {cost.weight_bytes / 1e6:.2f} MB" for cost in costs]),
        ("activations moved", [cost and _scaled(cost.moved_bytes, 1e6, "MB") for cost in costs]),
        *((escape(name), [cost and str(cost.operators.get(name, "–")) for cost in costs]) for name in operators),
    ):
        table.add_row(label, *(cell or "–" for cell in cells))
    return table


def _contributors(contributors: tuple[Contributor, ...]) -> Table:
    table = _table("module", "operators", "after", "multiply-adds (M)", "after", "moved (MB)", "after", justify="right")
    for one in contributors:
        cells = zip(_share(one.before), _share(one.after), strict=True)
        table.add_row(escape(one.module) or "the model itself", *(cell for pair in cells for cell in pair))
    return table


def _share(share: Share) -> tuple[str, str, str]:
    return str(share.operators), f"{share.multiply_adds / 1e6:.2f}", f"{share.moved_bytes / 1e6:.2f}"


def _provenance(provenance: Mapping[str, object]) -> Iterator[str]:
    for key, value in provenance.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        yield f"{key}: {escape(str(value))}"


def _size(size: int) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 10_000 else f"{size} bytes"


def _scaled(value: int | None, unit: float, name: str) -> str:
    return "unknown" if value is None else f"{value / unit:.2f} {name}"


def _table(*headings: str, justify: str = "left") -> Table:
    """Columns after the first are justified alike."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 or justify == "left" else "right", overflow="fold")
    return table


def escape(text: str) -> str:
    """Text of a model's or a file's own, as it is: no markup and nothing that moves the cursor."""
    return markup.escape("".join(each if each.isprintable() else "?" for each in text))
