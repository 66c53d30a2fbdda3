import importlib.util
import re

import pytest
from rich.console import Console

from mobilemix.errors import MissingDependencyError
from mobilemix.quantization.report import LISTED, Report, page, tables
from mobilemix.quantization.search import Choice, Trial
from mobilemix.quantization.sensitivity import Distance, Layer, Sensitivity

needs_plotly = pytest.mark.skipif(importlib.util.find_spec("plotly") is None, reason="plotly is not installed")


def report(count: int = 3, kept: tuple[str, ...] = ("net.1/conv_1",), **fields: object) -> Report:
    found = tuple(
        Sensitivity(
            Layer(f"net.{index}/conv_{index}", f"net.{index}", f"conv_{index}", 1_000_000, 4000, 0.001 * (index + 1)),
            sqnr=20.0 + index,
            drift=Distance(0.01 * (index + 1), 0.999, 0.95),
        )
        for index in range(count)
    )
    trials = (Trial((), 0.85, 0.05), Trial(kept, 0.9, 0.0))
    values = {
        "model": "net",
        "target": "onnx",
        "precision": "int8",
        "objective": "latency",
        "measure": "top-1",
        "samples": 20,
        "max_drop": 0.005,
        "reference": 0.9,
        "sensitivities": found,
        "choice": Choice(trials[-1] if kept else trials[0], trials),
        "seconds": {"float": 0.01, "all int8": 0.005, "mixed": 0.006},
        **fields,
    }
    return Report(**values)


def printed(one: Report) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        for table in tables(one):
            console.print(table)
    return capture.get()


def test_the_configurations():
    lines = [line.split("  ") for line in printed(report()).splitlines()[1:4]]
    rows = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    assert rows == [
        ["float", "3 of 3", "0%", "90.00%", "0.00%", "10.00"],
        ["all int8", "0 of 3", "100%", "85.00%", "5.00%", "5.00"],
        ["mixed", "1 of 3", "67%", "90.00%", "0.00%", "6.00"],
    ]


def test_a_search_that_leaves_nothing_in_float_has_no_mixed_model():
    text = printed(report(kept=()))
    assert "all int8" in text
    assert "mixed" not in text


def test_the_layers_that_drift_most_come_first():
    lines = printed(report(LISTED + 5)).splitlines()[-LISTED:]
    assert [line.split()[0] for line in lines] == [f"net.{index}/conv_{index}" for index in range(LISTED + 4, 4, -1)]
    assert {line.split()[-1] for line in lines} == {"int8"}


@needs_plotly
def test_names_are_no_markup():
    odd = Layer("[red]<b>/x", "[red]<b>", "x", None, 4)
    one = report(kept=(), sensitivities=(Sensitivity(odd, 20.0, Distance(0.1, 1.0, 1.0)),), seconds={})
    assert "[red]<b>/x" in printed(one)
    text = page(one)
    assert "&lt;b&gt;/x" in text
    assert "<b>/x" not in text


@needs_plotly
def test_the_page_has_every_layer_and_every_step_and_needs_no_network():
    text = page(report(LISTED + 5))
    for index in range(LISTED + 5):
        assert f"<td>net.{index}/conv_{index}</td>" in text
    assert 'id="errors"' in text
    assert 'id="steps"' in text
    assert not re.findall(r"<(?:script|link)[^>]*(?:src|href)=", text)


@needs_plotly
def test_the_same_search_gives_the_same_page():
    assert page(report()) == page(report())


def test_without_plotly_the_page_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mobilemix\[report\]'"):
        page(report())
