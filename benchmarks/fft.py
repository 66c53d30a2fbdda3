"""Fourier transforms in ONNX Runtime: its own DFT nodes, plain separable matrices, and what mobilemix makes of them.

    python benchmarks/fft.py             # every case, 1 and 2 threads; writes the table into docs/fft.md
    python benchmarks/fft.py --fit       # measures forms of transforms; prints the constants of the cost model
    python benchmarks/fft.py --check     # measures the forms that it chooses against dense matrices

A case is a module. Stock is `torch.onnx.export` of it as it is. Separable is the same module with torch.fft's functions
replaced by dense matrices along each axis, on real and imaginary parts apart, and mobilemix's other passes. Each round
runs every file once, so that a busy moment hits all of them.
"""

import argparse
import contextlib
import functools
import io
import logging
import platform
import random
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper
from scipy.optimize import nnls
from torch import Tensor, nn

from mobilemix.capture import capture
from mobilemix.models.affnet import AdaptiveFrequencyFilter
from mobilemix.passes import lower
from mobilemix.passes.complex_to_real import costs, dft, fft
from mobilemix.passes.complex_to_real.dft import Transform
from mobilemix.passes.complex_to_real.mixed_radix import network
from mobilemix.passes.complex_to_real.table import Call
from mobilemix.passes.complex_to_real.values import Real
from mobilemix.passes.editing import Edit

PAGE = Path(__file__).parents[1] / "docs" / "fft.md"
MARKS = "<!-- benchmarks/fft.py -->", "<!-- end -->"
SECONDS = 1.2
"""For the rounds of one case with one number of threads."""
LARGEST_DENSE = 4096
"""Length above which the separable baseline would need matrices of a gigabyte."""


class GlobalFilter(nn.Module):
    """(1, C, H, W) → rfft2 → times one complex number for each channel and frequency → irfft2."""

    def __init__(self, channels: int, size: int) -> None:
        """Random filter."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, size, size // 2 + 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Filter."""
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.weight)
        return torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")


class LongConvolution(nn.Module):
    """(1, C, L) → causal convolution of length L by transforms of length 2L, as in Hyena."""

    def __init__(self, channels: int, length: int) -> None:
        """Random filter, given by its spectrum."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, length + 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve."""
        length = x.shape[-1]
        spectrum = torch.fft.rfft(x, n=2 * length) * torch.view_as_complex(self.weight)
        return torch.fft.irfft(spectrum, n=2 * length)[..., :length]


class Mixing(nn.Module):
    """FNet: the real part of a transform over hidden units, then over tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Mix."""
        return torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real


def cases() -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """Name, module, shape of its input."""
    maps = ((384, 7), (64, 8), (256, 8), (384, 8), (256, 14), (384, 16), (192, 28), (64, 32), (192, 32))
    for channels, size in (*maps, (192, 56), (64, 64), (192, 64), (64, 128), (32, 256)):
        yield f"filter {channels} × {size}²", GlobalFilter(channels, size), (1, channels, size, size)
    for channels, length in ((64, 512), (64, 2048), (64, 8192)):
        yield f"convolution {channels} × {length}", LongConvolution(channels, length), (1, channels, length)
    yield "FNet mixing 128 × 768", Mixing(), (1, 128, 768)
    for channels, size in ((96, 32), (160, 16), (192, 8)):
        module = AdaptiveFrequencyFilter(channels)
        yield f"AFFNet mixer {channels} × {size}²", module, (1, channels, size, size)


def plain(name: str) -> Callable[..., Tensor]:
    """A function of torch.fft as dense matrices along each axis, without anything merged."""
    sign = -1 if name.lstrip("i").startswith(("fft", "rfft")) and not name.startswith("i") else 1

    def along(re: Tensor, im: Tensor | None, axis: int, n: int, outputs: int, scale: float) -> tuple[Tensor, Tensor]:
        c, s = (part.float() for part in dft.complex_matrix(re.shape[axis], n, outputs, sign, scale))
        times = (lambda x, m: x @ m.T) if axis % re.dim() == re.dim() - 1 else (lambda x, m: m @ x)
        if im is None:
            return times(re, c), times(re, s)
        return times(re, c) - times(im, s), times(im, c) + times(re, s)

    def run(x: Tensor, n: Any = None, s: Any = None, dim: Any = None, norm: str | None = None) -> Tensor:
        axes = [-2, -1] if name.endswith("2") else [-1 if dim is None else dim]
        sizes = list(s or ([n] if n else [x.shape[axis] for axis in axes]))
        inverse = name.startswith("i")
        re, im = (x.real, x.imag) if x.is_complex() else (x, None)
        scales = [size**-0.5 if norm == "ortho" else 1 / size if inverse else 1.0 for size in sizes]
        steps = list(zip(axes, sizes, scales, strict=True))
        if "rfft" in name and inverse:
            *others, (_, last, scale) = steps
            for axis, size, factor in others:
                re, im = along(re, im, axis, size, size, factor)
            c, d = dft.complex_to_real(re.shape[-1], last, sign, scale).float().chunk(2, 1)
            return re @ c.T + im @ d.T
        for axis, size, scale in reversed(steps):
            outputs = size // 2 + 1 if "rfft" in name and im is None else size
            re, im = along(re, im, axis, size, outputs, scale)
        return torch.complex(re, im)

    return run


@contextlib.contextmanager
def separable() -> Iterator[None]:
    """Within, torch.fft is the baseline."""
    with contextlib.ExitStack() as stack:
        for name in ("fft", "rfft", "irfft", "rfft2", "irfft2"):
            stack.enter_context(mock.patch.object(torch.fft, name, plain(name)))
        yield


def files(module: nn.Module, x: Tensor, folder: Path) -> dict[str, Path]:
    """The contenders, written."""
    found = {}
    for name in ("stock", "separable", "mobilemix"):
        if name == "separable" and isinstance(module, LongConvolution) and 2 * x.shape[-1] > LARGEST_DENSE:
            continue
        with separable() if name == "separable" else contextlib.nullcontext():
            source = module if name == "stock" else lower(capture(module, (x,)))
        found[name] = folder / f"{name}.onnx"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            torch.onnx.export(source, (x,), found[name], dynamo=True, verbose=False)
    return found


def session(model: Path | bytes, threads: int) -> onnxruntime.InferenceSession:
    """A file in ONNX Runtime on the CPU; threads that spin while they wait would make a busy machine erratic."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def interleave(runs: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Milliseconds by name: the best of rounds in which each runs once, since other programs only ever add."""
    for run in runs.values():
        run()
    milliseconds: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    rounds = 0
    while time.perf_counter() < end or rounds < 7:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            milliseconds[name].append(1e3 * (time.perf_counter() - start))
        rounds += 1
    return {name: min(times) for name, times in milliseconds.items()}


def compare(module: nn.Module, shape: tuple[int, ...]) -> dict[int, dict[str, float]]:
    """Milliseconds of each contender by the number of threads; all must agree with PyTorch."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module.eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        written = files(module, x, Path(folder))
        results = {}
        for threads in (1, 2):
            sessions = {name: session(path, threads) for name, path in written.items()}
            feed = {next(iter(sessions.values())).get_inputs()[0].name: x.numpy()}
            for name, runtime in sessions.items():
                found, expected = torch.from_numpy(runtime.run(None, feed)[0]), module(x)
                error = float((found - expected).norm() / expected.norm())
                assert error < 1e-4, f"{name} is off by {error:.1e}"
            runs = {name: functools.partial(runtime.run, None, feed) for name, runtime in sessions.items()}
            results[threads] = interleave(runs, SECONDS)
    return results


def table(pattern: str) -> list[str]:
    """Rows of a Markdown table."""
    rows = [
        "| case | mobilemix, ms | separable | DFT nodes | mobilemix, ms | separable | DFT nodes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| threads | 1 | 1 | 1 | 2 | 2 | 2 |",
    ]
    for name, module, shape in cases():
        if not re.search(pattern, name):
            continue
        cells = [name]
        for times in compare(module, shape).values():
            ours = times["mobilemix"]
            ratios = (f"{times[other] / ours:.2f} ×" if other in times else "–" for other in ("separable", "stock"))
            cells += [f"{ours:.3f}" if ours < 1 else f"{ours:.2f}", *ratios]
        rows.append(f"| {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def write(rows: list[str]) -> None:
    """Put the table into the page, between its marks."""
    start, end = MARKS
    before, _, rest = PAGE.read_text().partition(start)
    _, _, after = rest.partition(end)
    machine = f"2 cores {platform.machine().replace('x86_64', 'x86')}"
    versions = f"ONNX Runtime {onnxruntime.__version__}, torch {torch.__version__.split('+')[0]}"
    PAGE.write_text(f"{before}{start}\n{machine}, {versions}.\n\n" + "\n".join(rows) + f"\n{end}{after}")


# The constants of the cost model


class Negation(nn.Module):
    """An operator to put others in the place of."""

    def forward(self, x: Tensor) -> Tensor:
        """Negate."""
        return -x


def random_transform(generator: random.Random) -> tuple[Transform, int, int]:
    """A transform and the numbers before and behind its axis: sizes log-uniform, lengths with small factors."""

    def size(low: int, high: int) -> int:
        return round(low * (high / low) ** generator.random())

    while True:
        n = generator.choice((1, 1, 1, 3, 7)) * 2 ** generator.randint(2, 12)
        outer, inner = size(1, 16384), generator.choice((1, 1, size(2, 256)))
        if n <= 4096 and 500 < outer * n * inner < 4e6:
            takes = generator.choice(("real", "complex", "half"))
            signal, result = {"real": (n, n // 2 + 1), "complex": (n, n), "half": (n // 2 + 1, n)}[takes]
            return Transform(takes, n, signal, result, takes == "half", -1, 1.0), outer, inner


def onnx_of(transform: Transform, form: costs.Form, outer: int, inner: int) -> bytes:
    """The nodes that the pass makes for one form of a transform of (outer, inputs, inner)."""
    shape = (outer, transform.inputs, inner)
    edit = Edit(torch.export.export(Negation(), (torch.zeros(shape),)))
    (node,) = edit.graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default)
    call, data = Call(edit, node.target, node.meta["val"]), Real(edit, node.args[0])
    with edit.at(node):
        if len(form.factors) > 1:
            product = fft.run(call, network(transform, form.factors, False, False), data, form.around)
        else:
            product = fft.multiply(call, dft.dense(transform), data, form.around)
    constants, nodes = [], []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(numpy_helper.from_array(value, name))
        return name

    for item in edit.graph.nodes:
        if item.op == "placeholder" and item is not data.node:
            constant(item.name, edit.constant(item).numpy())
        elif item.op == "call_function" and item is not node:
            x, *rest = item.args
            name = item.target._opname
            if name in ("mm", "matmul"):
                nodes.append(helper.make_node("MatMul", [x.name, rest[0].name], [item.name]))
            elif name == "reshape":
                target = constant(f"{item.name}_shape", np.array(rest[0], np.int64))
                nodes.append(helper.make_node("Reshape", [x.name, target], [item.name]))
            elif name == "index_select":
                nodes.append(helper.make_node("Gather", [x.name, rest[1].name], [item.name], axis=rest[0]))
            else:
                order = list(range(x.meta["val"].dim()))
                a, b = rest if name == "transpose" else (0, 1)
                order[a], order[b] = b, a
                nodes.append(helper.make_node("Transpose", [x.name], [item.name], perm=order))
    x, y = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, size)
        for name, size in ((data.node.name, shape), (product.node.name, None))
    )
    model = helper.make_model(
        helper.make_graph(nodes, "form", [x], [y], constants), opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    )
    return model.SerializeToString()


def measure(transform: Transform, forms: list[costs.Form], outer: int, inner: int, seconds: float) -> list[float]:
    """Nanoseconds of each form on one thread."""
    sessions = [session(onnx_of(transform, form, outer, inner), 1) for form in forms]
    feed = {
        sessions[0].get_inputs()[0].name: np.random.default_rng(0).standard_normal(
            (outer, transform.inputs, inner), np.float32
        )
    }
    runs = {str(index): functools.partial(runtime.run, None, feed) for index, runtime in enumerate(sessions)}
    return [1e6 * value for value in interleave(runs, seconds).values()]


def forms_of(transform: Transform, outer: int, inner: int) -> tuple[list[costs.Form], list[costs.Form]]:
    """Every dense form, and of those in stages the best of each kind."""
    dense = list(costs.dense_forms(transform.inputs, transform.outputs, outer, inner))
    mixed = sorted(costs.mixed(transform, outer, inner), key=lambda form: form.cost)
    kinds = {(form.around, len(form.factors)): form for form in reversed(mixed)}
    return dense, [form for form in kinds.values() if form.cost < 2 * mixed[0].cost]


def fit(count: int = 90) -> None:
    """Print the constants: non-negative least squares of relative errors, outliers counting less and less."""
    generator = random.Random(0)
    rows, measured = [], []
    names = [(kind, index) for kind, values in costs.NANOSECONDS.items() for index in range(len(values))]
    for _ in range(count):
        transform, outer, inner = random_transform(generator)
        dense, mixed = forms_of(transform, outer, inner)
        forms = [form for form in dense if form.cost < 1e8] + mixed
        measured += measure(transform, forms, outer, inner, 0.15 * len(forms))
        for form in forms:
            row = dict.fromkeys(names, 0.0)
            for kind, features in form.operators:
                for index, feature in enumerate(features):
                    row[kind, index] += feature
            rows.append([1.0, *row.values()])
    matrix, times = np.array(rows), np.array(measured)
    weights = 1 / times
    for _ in range(50):
        found, _ = nnls(matrix * weights[:, None], times * weights)
        errors = np.log(np.maximum(matrix @ found, 1) / times)
        weights = 1 / (times * np.sqrt(1 + (errors / 0.2) ** 2))
    half, most = 100 * np.quantile(np.abs(errors), (0.5, 0.9))
    print(f"{len(times)} forms; half of them within {half:.0f} %, nine of ten within {most:.0f} %")
    constants = dict(zip(names, found[1:], strict=True))
    for kind, values in costs.NANOSECONDS.items():
        print(f'    "{kind}": ({", ".join(f"{constants[kind, index]:.3g}" for index in range(len(values)))}),')


def check(count: int = 60) -> None:
    """Measure the chosen form against dense matrices, for random transforms."""
    generator = random.Random(1)
    ratios = []
    while len(ratios) < count:
        transform, outer, inner = random_transform(generator)
        form, plain = (
            costs.best(transform, outer, inner),
            costs.dense(transform.inputs, transform.outputs, outer, inner),
        )
        if form == plain or plain.cost > 3e8:
            continue
        chosen, dense = measure(transform, [form, plain], outer, inner, 0.5)
        ratios.append(chosen / dense)
        case = f"{transform.takes} {outer} × {transform.n} × {inner}, {form.factors}"
        print(f"{ratios[-1]:.2f} ({form.cost / plain.cost:.2f} expected): {case}", flush=True)
    print(f"median {np.median(ratios):.2f}, worst {max(ratios):.2f}")


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fit", action="store_true", help="the constants of the cost model")
    parser.add_argument("--check", action="store_true", help="the choices of the cost model")
    parser.add_argument("--only", default="", metavar="REGEX", help="these cases, without writing the table")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if arguments.fit:
        fit()
    elif arguments.check:
        check()
    elif arguments.only:
        table(arguments.only)
    else:
        write(table(""))


if __name__ == "__main__":
    main()
