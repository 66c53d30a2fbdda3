"""What a search found, as tables for a terminal and as a page with plots."""

import dataclasses
import html
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mobilemix.errors import MissingDependencyError
from mobilemix.quantization.search import Choice
from mobilemix.quantization.sensitivity import Layer, Sensitivity

if TYPE_CHECKING:
    from rich.table import Table

FLOAT = "float"
MIXED = "mixed"
LISTED = 15
"""Layers that the terminal's table lists, those that drift most; the page and JSON have all."""


@dataclasses.dataclass(frozen=True)
class Report:
    """A model's quantisation, layer by layer and step by step.

    Attributes:
        model: its name.
        target: what it was quantised for.
        precision: of the layers that are quantised.
        objective: of `mobilemix.quantization.search.OBJECTIVES`.
        measure: what scores are, see `mobilemix.quantization.search.Judge`.
        samples: how many inputs a score is of.
        max_drop: the limit, from 0 to 1.
        reference: score of the float model.
        sensitivities: of every layer, in the order of the graph.
        choice: the layers in float, and what was tried.
        seconds: for one sample on one thread, by `configurations`; empty where no runtime here tells.
    """

    model: str
    target: str
    precision: str
    objective: str
    measure: str
    samples: int
    max_drop: float
    reference: float
    sensitivities: tuple[Sensitivity, ...]
    choice: Choice
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def layers(self) -> list[Layer]:
        """All that can be quantised."""
        return [one.layer for one in self.sensitivities]

    @property
    def configurations(self) -> dict[str, tuple[frozenset[str], float]]:
        """Layers in float and score, of the float model, of the one with all layers quantised, and of the mixed one."""
        names = frozenset(layer.name for layer in self.layers)
        first, chosen = self.choice.trials[0], self.choice.chosen
        found = {FLOAT: (names, self.reference), f"all {self.precision}": (frozenset(first.kept), first.score)}
        return found | ({MIXED: (frozenset(chosen.kept), chosen.score)} if chosen.kept else {})

    def precision_of(self, layer: Layer) -> str:
        """What the search chose for a layer."""
        return FLOAT if layer.name in self.choice.chosen.kept else self.precision


def tables(report: Report) -> "Iterator[Table]":
    """The configurations, and the layers that drift most."""
    from rich.markup import escape

    yield _table(_configuration(report), _configurations(report))
    worst = sorted(report.sensitivities, key=lambda one: one.drift.relative_l2, reverse=True)[:LISTED]
    yield _table(_LAYER, [[escape(cell) for cell in _cells(report, one)] for one in worst])


def page(report: Report) -> str:
    """The same for a browser, in one file that needs no network, with the error of every layer and every step plotted.

    Raises:
        MissingDependencyError: there is no plotly.
    """
    if importlib.util.find_spec("plotly") is None:
        raise MissingDependencyError("plotly", "the page of a quantisation", "report")
    title = html.escape(f"{report.model} for {report.target}: {report.precision}, mixed")
    said = html.escape(
        f"{len(report.choice.chosen.kept)} of {len(report.layers)} layers stay in float, so that {report.measure} on "
        f"{report.samples} samples drops by {report.max_drop:.2%} at most; for {report.objective}."
    )
    sections = (
        _html(_configuration(report), _configurations(report)),
        _plot(_errors(report), "errors", plotly=True),
        _plot(_steps(report), "steps", plotly=False),
        _html(_LAYER, [_cells(report, one) for one in report.sensitivities]),
    )
    body = "\n".join(sections)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f"<!doctype html>\n<html><head>{head}</head>\n<body><h1>{title}</h1><p>{said}</p>\n{body}\n</body></html>\n"


_STYLE = (
    "body{font-family:sans-serif;margin:2em;max-width:80em}table{border-collapse:collapse;margin:1em 0}"
    "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}"
    "td:first-child,th:first-child{text-align:left}"
)
_COLOURS = ("#4c78a8", "#e45756")
"""Of layers that are quantised, and of those left in float."""
_ROW = 18
"""Height of a layer's bar, in pixels."""


def _errors(report: Report) -> Any:
    """Bars for each layer, in the order of the graph: SQNR, and drift."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    figure = make_subplots(
        1,
        2,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        subplot_titles=("SQNR of the layer (dB)", "drift of the outputs"),
    )
    for name, colour in zip((report.precision, FLOAT), _COLOURS, strict=True):
        found = [one for one in report.sensitivities if report.precision_of(one.layer) == name]
        names = [html.escape(one.layer.name) for one in found]
        for column, values in enumerate(([one.sqnr for one in found], [one.drift.relative_l2 for one in found]), 1):
            bars = graph_objects.Bar(
                x=values, y=names, orientation="h", name=name, marker_color=colour, showlegend=column == 1
            )
            figure.add_trace(bars, 1, column)
    order = [html.escape(layer.name) for layer in report.layers]
    figure.update_yaxes(categoryorder="array", categoryarray=order, autorange="reversed", automargin=True)
    figure.update_xaxes(type="log", exponentformat="power", col=2)
    return figure.update_layout(height=160 + _ROW * len(order), title="Each layer quantised alone", barmode="overlay")


def _steps(report: Report) -> Any:
    """Every choice that was tried."""
    from plotly import graph_objects

    trials = report.choice.trials
    counts, drops = [len(trial.kept) for trial in trials], [trial.drop for trial in trials]
    numbers = [str(number) for number in range(1, len(trials) + 1)]
    chosen = report.choice.chosen
    figure = graph_objects.Figure(
        [
            graph_objects.Scatter(
                x=counts, y=drops, mode="markers+text", text=numbers, textposition="top center", name="tried"
            ),
            graph_objects.Scatter(
                x=[len(chosen.kept)],
                y=[chosen.drop],
                mode="markers",
                marker={"size": 14, "symbol": "circle-open"},
                name="chosen",
            ),
        ]
    )
    figure.add_hline(report.max_drop, line_dash="dash", annotation_text="limit")
    figure.update_xaxes(title="layers in float")
    figure.update_yaxes(title=f"drop of {report.measure}", tickformat=".1%")
    return figure.update_layout(title="Choices in the order in which they were tried")


def _plot(figure: Any, name: str, *, plotly: bool) -> str:
    """A figure with a fixed name, so that the same search gives the same bytes; the first brings plotly along."""
    text: str = figure.to_html(full_html=False, include_plotlyjs=plotly, div_id=name)
    return text


def _html(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [("th", headings), *(("td", row) for row in rows)]
    cells = ["".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) for tag, row in lines]
    return "<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in cells) + "\n</table>"


def _configuration(report: Report) -> tuple[str, ...]:
    return ("configuration", "layers in float", "multiply-adds quantised", report.measure, "drop", "ms, one thread")


_LAYER = ("layer", "SQNR (dB)", "drift", "cosine", "top-1", "M multiply-adds", "weights (kB)", "ms", "becomes")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _configurations(report: Report) -> list[list[str]]:
    rows = []
    total = sum(layer.multiply_adds or 0 for layer in report.layers)
    for name, (kept, score) in report.configurations.items():
        quantised = sum(layer.multiply_adds or 0 for layer in report.layers if layer.name not in kept)
        seconds = report.seconds.get(name)
        rows.append(
            [
                name,
                f"{len(kept)} of {len(report.layers)}",
                f"{quantised / total:.0%}" if total else "–",
                f"{score:.2%}",
                f"{report.reference - score:.2%}",
                "–" if seconds is None else f"{seconds * 1e3:.2f}",
            ]
        )
    return rows


def _cells(report: Report, one: Sensitivity) -> list[str]:
    layer, drift = one.layer, one.drift
    return [
        layer.name,
        f"{one.sqnr:.1f}",
        f"{drift.relative_l2:.1e}",
        f"{drift.cosine:.6f}",
        f"{drift.top1:.1%}",
        "–" if layer.multiply_adds is None else f"{layer.multiply_adds / 1e6:.2f}",
        f"{layer.weight_bytes / 1e3:.1f}",
        "–" if layer.seconds is None else f"{layer.seconds * 1e3:.3f}",
        report.precision_of(layer),
    ]
