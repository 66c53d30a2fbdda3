"""State-space scans in ONNX Runtime: what mobilemix chooses beside each single lowering; nodes and seconds of export.

    python benchmarks/scan.py                   # every case, 1 and 2 threads; writes the tables into docs/scans.md
    python benchmarks/scan.py --only "D=384"    # these cases, without writing

Latencies are the shortest of rounds in which each file runs once, so that a busy moment hits all of them and does not
count. Ratios are to mobilemix's choice.
"""

import argparse
import functools
import logging
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.export import ExportedProgram

from mobilemix import ops
from mobilemix.capture import capture
from mobilemix.passes import SHARED, lower, lower_scans, lower_ssd_chunk_scan
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Lowered
from mobilemix.targets.coreml import CoreMLTarget
from mobilemix.targets.coreml.convert import convert
from mobilemix.targets.onnx import OnnxTarget
from mobilemix.targets.onnx.convert import write

PAGE = Path(__file__).parents[1] / "docs" / "scans.md"
LENGTHS = (49, 196, 784, 3136)
SELECTIVE = ((96, 1), (384, 1), (96, 16), (192, 16), (384, 16))
"""Channels and states."""
SSD = ((4, 48, 64), (8, 32, 16), (24, 64, 64))
"""Heads, their width, states."""
LONGEST_UNROLLED = 49
"""Exporting a loop of 784 steps takes minutes."""
LONGEST_DOUBLING = 784
SECONDS, ROUNDS = 0.7, 8
"""The least of one case with one number of threads."""

Form = Callable[[ExportedProgram], ExportedProgram]


class Selective(nn.Module):
    """Mamba-1's scan, from projections (1, d, L) and (1, n, L)."""

    def __init__(self, channels: int, states: int) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.arange(1.0, states + 1).repeat(channels, 1))
        self.D, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.full((channels,), -2.0))

    def forward(self, u: Tensor, delta: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return ops.selective_scan(u, delta, self.A, b, c, self.D, delta_bias=self.bias, delta_softplus=True)


class States(Selective):
    """The same by way of every state: decays and inputs (L, 1, n, d), a recurrence, a readout."""

    def forward(self, u: Tensor, delta: Tensor, b: Tensor, c: Tensor) -> Tensor:
        delta = F.softplus(delta + self.bias[:, None])
        decays = torch.exp(delta.permute(2, 0, 1).unsqueeze(2) * self.A.T)
        inputs = (delta * u).permute(2, 0, 1).unsqueeze(2) * b.permute(2, 0, 1).unsqueeze(3)
        y = (c.permute(2, 0, 1).unsqueeze(2) @ self.recurrence(decays, inputs)).squeeze(2)
        return y.permute(1, 2, 0) + u * self.D[:, None]

    def recurrence(self, decays: Tensor, inputs: Tensor) -> Tensor:
        return ops.linear_scan(decays, inputs)


class Unrolled(States):
    """The recurrence as a loop."""

    def recurrence(self, decays: Tensor, inputs: Tensor) -> Tensor:
        states = [inputs[0]]
        for decay, value in zip(decays[1:], inputs[1:], strict=True):
            states.append(decay * states[-1] + value)
        return torch.stack(states)


class Doubling(States):
    """The recurrence by Hillis and Steele: log L times, each step takes in the one 1, 2, 4, … before it."""

    def recurrence(self, decays: Tensor, inputs: Tensor) -> Tensor:
        distance = 1
        while distance < len(inputs):
            inputs = torch.cat([inputs[:distance], inputs[distance:] + decays[distance:] * inputs[:-distance]])
            decays = torch.cat([decays[:distance], decays[distance:] * decays[:-distance]])
            distance *= 2
        return inputs


class Ssd(nn.Module):
    """Mamba-2's scan."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.A = nn.Parameter(-torch.linspace(1, 4, heads))

    def forward(self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return ops.ssd_chunk_scan(x, dt, self.A, b, c, 64, dt_softplus=True)


def always(_node: object) -> bool:
    """Every scan stays for the target."""
    return True


def chosen(program: ExportedProgram) -> ExportedProgram:
    """As exported."""
    return lower(program, SHARED + OnnxTarget.passes)


def chunks(program: ExportedProgram) -> ExportedProgram:
    """In plain operators."""
    return lower(program, SHARED + lower_scans())


def nodes(program: ExportedProgram) -> ExportedProgram:
    """In `Scan` nodes."""
    return lower(program, SHARED + lower_scans(stays=always))


def as_written(program: ExportedProgram) -> ExportedProgram:
    """Loops as loops, which the shared passes would recognise."""
    return lower(program, [step for step in SHARED if step.name != "reroll_loops"])


def in_chunks_of(size: int) -> Form:
    """SSD with a fixed chunk size."""

    def form(program: ExportedProgram) -> ExportedProgram:
        fixed = {"_WHOLE": size, "_SIZES": range(size, size + 1)}
        with mock.patch.multiple(lower_ssd_chunk_scan, **fixed):
            return chunks(program)

    return form


def cases() -> Iterator[tuple[str, dict[str, tuple[nn.Module, Form] | bytes], tuple[Tensor, ...]]]:
    """Name, forms, inputs; the first form is mobilemix's choice."""
    for channels, states in SELECTIVE:
        for length in LENGTHS:
            shapes = (channels, length), (channels, length), (states, length), (states, length)
            module, expanded = Selective(channels, states), States(channels, states)
            forms: dict[str, tuple[nn.Module, Form] | bytes] = {
                "mobilemix": (module, chosen),
                "Scan": (module, nodes),
                "chunks": (module, chunks),
                "all states": (expanded, chunks),
            }
            if length <= LONGEST_UNROLLED:
                forms["unrolled"] = Unrolled(channels, states), as_written
            if length <= LONGEST_DOUBLING and (channels, states) == (96, 16):
                forms["doubling"] = Doubling(channels, states), as_written
            yield f"D={channels}, N={states}, L={length}", forms, tuple(torch.randn(1, *shape) for shape in shapes)
    for heads, width, states in SSD:
        for length in LENGTHS:
            shapes = (length, heads, width), (length, heads), (length, 1, states), (length, 1, states)
            module = Ssd(heads)
            forms = {"mobilemix": (module, chosen), "Scan": ssd_scan(module, length, heads, width, states)}
            forms |= {f"T={size}": (module, in_chunks_of(size)) for size in (32, 64, 196) if size < length}
            name = f"h={heads}, p={width}, n={states}, L={length}"
            yield name, forms, tuple(torch.randn(1, *shape) for shape in shapes)


def ssd_scan(module: Ssd, length: int, heads: int, width: int, states: int) -> bytes:
    """SSD as one `Scan` over the steps, written by hand."""
    value = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    node = helper.make_node
    body = helper.make_graph(
        [
            node("MatMul", ["moved", "b_t"], ["added"]),
            node("Mul", ["decay", "state"], ["kept"]),
            node("Add", ["kept", "added"], ["next"]),
            node("MatMul", ["next", "c_t"], ["y_t"]),
        ],
        "step",
        [
            value(name, shape=shape)
            for name, shape in {
                "state": (heads, width, states),
                "decay": (heads, 1, 1),
                "moved": (heads, width, 1),
                "b_t": (1, 1, states),
                "c_t": (1, states, 1),
            }.items()
        ],
        [value("next", shape=(heads, width, states)), value("y_t", shape=(heads, width, 1))],
    )
    shapes = {"decays": (length, heads, 1, 1), "steps": (length, heads, 1, 1), "xs": (length, heads, width, 1)}
    shapes |= {"bs": (length, 1, 1, states), "cs": (length, 1, states, 1), "ys": (1, length, heads, width)}
    reshapes = {"s": "steps", "x": "xs", "b": "bs", "c": "cs"}
    graph = helper.make_graph(
        [
            node("Softplus", ["dt"], ["s"]),
            *(node("Reshape", [name, f"{to}_shape"], [to]) for name, to in reshapes.items()),
            node("Mul", ["steps", "A"], ["logarithms"]),
            node("Exp", ["logarithms"], ["decays"]),
            node("Mul", ["steps", "xs"], ["moved_xs"]),
            node("Scan", ["zero", "decays", "moved_xs", "bs", "cs"], ["last", "y"], body=body, num_scan_inputs=4),
            node("Reshape", ["y", "ys_shape"], ["ys"]),
        ],
        "ssd",
        [
            value("x", shape=(1, length, heads, width)),
            value("dt", shape=(1, length, heads)),
            value("b", shape=(1, length, 1, states)),
            value("c", shape=(1, length, 1, states)),
        ],
        [value("ys", shape=shapes["ys"])],
        [
            numpy_helper.from_array(module.A.detach().numpy().reshape(heads, 1, 1), "A"),
            numpy_helper.from_array(np.zeros((heads, width, states), np.float32), "zero"),
            *(numpy_helper.from_array(np.array(shape), f"{name}_shape") for name, shape in shapes.items()),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def lowered(program: ExportedProgram) -> Lowered:
    """What targets take."""
    names = tuple(map(str, program.graph_signature.user_inputs))
    return Lowered("scan", program, names, ("y",), None, None, None, {})


def export(module: nn.Module, form: Form, inputs: tuple[Tensor, ...], path: Path) -> tuple[bytes, float]:
    """The file, and how long mobilemix took after the capture."""
    program = capture(module, inputs)
    start = time.perf_counter()
    write(lowered(form(program)), Recipe(model="scan", target="onnx"), path)
    return path.read_bytes(), time.perf_counter() - start


def session(model: bytes, threads: int) -> onnxruntime.InferenceSession:
    """In ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def interleave(models: dict[str, bytes], inputs: tuple[Tensor, ...], threads: int) -> dict[str, float]:
    """Shortest latency of each in milliseconds; all of them must agree with the first."""
    sessions = {name: session(model, threads) for name, model in models.items()}
    arrays = [value.numpy() for value in inputs]
    feeds = {
        name: {value.name: array for value, array in zip(each.get_inputs(), arrays, strict=True)}
        for name, each in sessions.items()
    }
    outputs = {name: each.run(None, feeds[name])[0] for name, each in sessions.items()}
    expected = outputs["mobilemix"]
    for name, output in outputs.items():
        error = np.linalg.norm(output - expected) / np.linalg.norm(expected)
        assert error < 1e-5, f"{name} differs by {error:.1e}"
    best = dict.fromkeys(sessions, float("inf"))
    end, rounds = time.perf_counter() + SECONDS, 0
    while time.perf_counter() < end or rounds < ROUNDS:
        rounds += 1
        for name, each in sessions.items():
            start = time.perf_counter()
            each.run(None, feeds[name])
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def compare(name: str, forms: dict[str, tuple[nn.Module, Form] | bytes], inputs: tuple[Tensor, ...]) -> dict[str, str]:
    """One row: milliseconds of mobilemix's choice, and of each other form the ratio, for 1 and 2 threads."""
    models, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for label, form in forms.items():
            if isinstance(form, bytes):
                models[label] = form
            else:
                models[label], seconds[label] = export(*form, inputs, Path(folder, f"{label}.onnx"))
    latencies = [interleave(models, inputs, threads) for threads in (1, 2)]
    counts = {label: len(onnx.load_from_string(model).graph.node) for label, model in models.items()}
    row = {"": name, "ms": " / ".join(f"{each['mobilemix']:.3g}" for each in latencies)}
    row["nodes"], row["export, s"] = str(counts["mobilemix"]), f"{seconds['mobilemix']:.1f}"
    for label in list(forms)[1:]:
        ratios = " / ".join(f"{each[label] / each['mobilemix']:.2f}" for each in latencies)
        row[label] = f"{ratios} ({counts[label]})"
    return row


def core_ml() -> list[dict[str, str]]:
    """Operations of a package, and how long a conversion to float16 takes, for one scan."""
    rows = []
    for length in LENGTHS:
        inputs = tuple(torch.randn(1, size, length) for size in (96, 96, 16, 16))
        others = tuple(torch.randn(1, length, *shape) for shape in ((4, 48), (4,), (1, 64), (1, 64)))
        row = {"L": str(length)}
        for label, module, given in (("Mamba", Selective(96, 16), inputs), ("SSD", Ssd(4), others)):
            program = chunks(capture(module, given))
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "scan.mlpackage")
                start = time.perf_counter()
                convert(lowered(program), Recipe(model="scan", target="coreml", input="tensor", precision="fp16"), path)
                seconds = time.perf_counter() - start
                operations = sum(CoreMLTarget().op_histogram(path).values())
            row |= {f"{label}, operations": str(operations), f"{label}, s": f"{seconds:.1f}"}
        rows.append(row)
    return rows


def table(rows: list[dict[str, str]]) -> list[str]:
    """Markdown."""
    columns = list(dict.fromkeys(label for row in rows for label in row))
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    return lines + [f"| {' | '.join(row.get(column, '–') for column in columns)} |" for row in rows]


def put(name: str, lines: list[str]) -> None:
    """Put a table into the page, between its marks."""
    start, end = f"<!-- benchmarks/scan.py {name} -->", "<!-- end -->"
    before, _, rest = PAGE.read_text().partition(start)
    _, _, after = rest.partition(end)
    machine = f"2 cores {platform.machine().replace('x86_64', 'x86')}"
    versions = f"ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__.split('+')[0]}"
    PAGE.write_text(f"{before}{start}\n{machine}, {versions}.\n\n" + "\n".join(lines) + f"\n{end}{after}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="REGEX", help="these cases, without writing the tables")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    rows: dict[str, list[dict[str, str]]] = {"selective": [], "ssd": []}
    for name, forms, inputs in cases():
        if re.search(arguments.only or "", name):
            row = compare(name, forms, inputs)
            print(row, flush=True)
            rows["ssd" if name.startswith("h") else "selective"].append(row)
    if arguments.only is None:
        for name, found in {**rows, "coreml": core_ml()}.items():
            put(name, table(found))


if __name__ == "__main__":
    main()
