"""Equivalent forms of what backbones are made of, side by side in ONNX Runtime, and the one that mobilemix writes.

    python benchmarks/forms.py                    # every case, 1 and 2 threads; writes the table into docs/forms.md
    python benchmarks/forms.py --only "gelu"      # these cases, without writing
    python benchmarks/forms.py --check            # fails where another form beats mobilemix's by more than a tenth

A case is a graph as exporters write it, other graphs that compute the same, and what `mobilemix.targets.onnx.rewrites`
makes of the first; outputs are compared before anything is timed. Each number of threads has a process of its own,
because worker threads of sessions disturb one another. Forms take turns, and a ratio is the median of those within a
turn, with a 95 % interval of that median.
"""

import argparse
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mobilemix.targets.onnx.rewrites import rewrite

PAGE = Path(__file__).parents[1] / "docs" / "forms.md"
OURS = "mobilemix"
TOLERANCE = 1e-4
"""Relative L2 between forms of one case."""
MARGIN = 1.10
"""By how much another form may be faster before `--check` complains."""
WARM_UP, SECONDS, LEAST_TURNS = 5, 0.3, 40

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One question at one shape.

    Attributes:
        question: what is computed.
        shape: of what decides, for the table.
        inputs, outputs: of all forms, in ONNX's text syntax.
        source: name of the form that exporters write, which mobilemix rewrites.
        forms: name to the nodes between inputs and outputs.
        weights: by the names that the nodes call them.
    """

    question: str
    shape: str
    inputs: str
    outputs: str
    source: str
    forms: Mapping[str, str]
    weights: Weights

    def model(self, form: str) -> onnx.ModelProto:
        """One form as a model."""
        graph = onnx.parser.parse_graph(f"case ({self.inputs}) => ({self.outputs}) {{ {self.forms[form]} }}")
        used = {name for node in graph.node for name in node.input}
        tensors = (onnx.numpy_helper.from_array(value, name) for name, value in self.weights.items() if name in used)
        graph.initializer.extend(tensors)
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)

    def models(self) -> dict[str, onnx.ModelProto]:
        """All forms, mobilemix's first."""
        ours = ir.from_proto(onnx.shape_inference.infer_shapes(self.model(self.source), strict_mode=True))
        rewrite(ours)
        return {OURS: ir.to_proto(ours)} | {form: self.model(form) for form in self.forms}


def weight(*shape: int) -> np.ndarray:
    """Noise that keeps the size of what it multiplies."""
    values = np.random.default_rng(sum(shape)).standard_normal(shape) / math.sqrt(math.prod(shape[1:]) or 1)
    return values.astype(np.float32)


def integers(*values: int) -> np.ndarray:
    """A shape."""
    return np.array(values, np.int64)


def scalars(**values: float) -> dict[str, np.ndarray]:
    """Constants of one element."""
    return {name: np.array(value, np.float32) for name, value in values.items()}


def sequences() -> Iterator[Case]:
    """Pointwise convolutions of sequences, such as hidden states."""
    for channels, outputs, positions in (
        (320, 640, 9),
        (512, 1024, 9),
        (192, 384, 25),
        (128, 256, 49),
        (224, 448, 64),
        (128, 256, 100),
        (128, 256, 196),
    ):
        kernel = weight(outputs, channels, 1)
        yield Case(
            "pointwise convolution of a sequence",
            f"{channels} → {outputs}, {positions} positions",
            f"float[1, {channels}, {positions}] x",
            f"float[1, {outputs}, {positions}] y",
            "Conv",
            {
                "Conv": "y = Conv(x, w)",
                "tokens @ weights": "t = Transpose<perm=[0,2,1]>(x) m = MatMul(t, wt) y = Transpose<perm=[0,2,1]>(m)",
                "weights @ sequence": "y = MatMul(wm, x)",
                "image of one row": "i = Unsqueeze(x, two) m = Conv(i, wi) y = Squeeze(m, two)",
            },
            {
                "w": kernel,
                "wm": kernel[:, :, 0],
                "wt": np.ascontiguousarray(kernel[:, :, 0].T),
                "wi": kernel[..., None],
                "two": integers(2),
            },
        )


def flattened() -> Iterator[Case]:
    """A norm and a pointwise convolution of an image's pixels, between convolutions of the image."""
    for channels, outputs, side in ((128, 148, 14), (192, 76, 7), (224, 192, 14)):
        kernel, before, after = weight(outputs, channels, 1), weight(channels, 1, 3, 3), weight(outputs, 1, 3, 3)
        first = f"h = Conv<group={channels}, pads=[1,1,1,1]>(x, before)"
        last = f"y = Conv<group={outputs}, pads=[1,1,1,1]>(m, after)"
        yield Case(
            "norm and convolution of pixels, between convolutions",
            f"{channels} → {outputs}, {side} × {side}",
            f"float[1, {channels}, {side}, {side}] x",
            f"float[1, {outputs}, {side}, {side}] y",
            "sequence",
            {
                "sequence": f"""{first} s = Reshape(h, flat) t = Transpose<perm=[0,2,1]>(s)
                    n = LayerNormalization<axis=-1>(t, scale) u = Transpose<perm=[0,2,1]>(n)
                    c = Conv(u, w) m = Reshape(c, image) {last}""",
                "tokens": f"""{first} s = Reshape(h, flat) t = Transpose<perm=[0,2,1]>(s)
                    n = LayerNormalization<axis=-1>(t, scale) p = MatMul(n, wt) c = Transpose<perm=[0,2,1]>(p)
                    m = Reshape(c, image) {last}""",
            },
            {
                "w": kernel,
                "wt": np.ascontiguousarray(kernel[:, :, 0].T),
                "before": before,
                "after": after,
                "scale": np.abs(weight(channels)) + 0.5,
                "flat": integers(1, channels, side * side),
                "image": integers(1, outputs, side, side),
            },
        )


def depthwise() -> Iterator[Case]:
    """Depthwise convolutions of odd numbers of channels."""
    for channels, side in ((147, 14), (75, 7), (27, 4), (148, 14), (104, 16)):
        more = -channels % 16
        first, second = weight(channels, 64, 1, 1), weight(channels, 1, 3, 3)
        padded = (np.concatenate([part, np.zeros((more, *part.shape[1:]), part.dtype)]) for part in (first, second))
        yield Case(
            "pointwise, then depthwise convolution",
            f"{channels}, {side} × {side}",
            f"float[1, 64, {side}, {side}] x",
            f"float[1, {channels}, {side}, {side}] y",
            "as it is",
            {
                "as it is": f"m = Conv(x, w) y = Conv<group={channels}, pads=[1,1,1,1]>(m, f)",
                "to a multiple of 16": f"""m = Conv(x, w16) p = Conv<group={channels + more}, pads=[1,1,1,1]>(m, f16)
                    y = Slice(p, start, stop, one)""",
            },
            {"w": first, "f": second, "start": integers(0), "stop": integers(channels), "one": integers(1)}
            | dict(zip(("w16", "f16"), padded, strict=True)),
        )


def norms() -> Iterator[Case]:
    """A ConvNeXt block: depthwise convolution, norm over channels, expansion, GELU, projection."""
    gelu = "d = Div(h, root2) e = Erf(d) o = Add(e, unit) o2 = Mul(half, o) g = Mul(h, o2)"
    for channels, hidden, side in ((48, 192, 28), (96, 384, 14), (192, 768, 7)):
        expand, project = weight(hidden, channels, 1, 1), weight(channels, hidden, 1, 1)
        first = f"i = Conv<group={channels}, pads=[3,3,3,3]>(x, filters)"
        layer = "t = Transpose<perm=[0,2,3,1]>(i) n = LayerNormalization<axis=-1>(t, scale)"
        yield Case(
            "depthwise 7 × 7, channel norm, MLP, skip",
            f"{channels} → {hidden}, {side} × {side}",
            f"float[1, {channels}, {side}, {side}] x",
            f"float[1, {channels}, {side}, {side}] y",
            "means",
            {
                "means": f"""{first} mean = ReduceMean(i, axis) c = Sub(i, mean) q = Mul(c, c)
                    v = ReduceMean(q, axis) ve = Add(v, eps) s = Sqrt(ve) r = Reciprocal(s) k = Mul(c, r)
                    n = Mul(k, scales) h = Conv(n, w1) {gelu} p = Conv(g, w2) y = Add(x, p)""",
                "LayerNormalization, MatMul": f"""{first} {layer} h = MatMul(n, w1t) {gelu} m = MatMul(g, w2t)
                    p = Transpose<perm=[0,3,1,2]>(m) y = Add(x, p)""",
                "LayerNormalization, MatMul, Conv": f"""{first} {layer} h = MatMul(n, w1t) {gelu}
                    m = Transpose<perm=[0,3,1,2]>(g) p = Conv(m, w2) y = Add(x, p)""",
            },
            {
                "filters": weight(channels, 1, 7, 7),
                "scale": np.abs(weight(channels)) + 0.5,
                "scales": (np.abs(weight(channels)) + 0.5)[:, None, None],
                "w1": expand,
                "w2": project,
                "w1t": np.ascontiguousarray(expand[:, :, 0, 0].T),
                "w2t": np.ascontiguousarray(project[:, :, 0, 0].T),
                "axis": integers(1),
            }
            | scalars(eps=1e-5, root2=math.sqrt(2), half=0.5, unit=1.0),
        )


def activations() -> Iterator[Case]:
    """Elementwise functions after a convolution."""
    constants = scalars(root2=math.sqrt(2), half=0.5, unit=1.0, low=-0.01, high=0.01, zero=0.0)
    functions = {
        "GELU": (
            "half last",
            {
                "half last": "d = Div(h, root2) e = Erf(d) o = Add(e, unit) o2 = Mul(half, o) y = Mul(h, o2)",
                "half in the weights": "k = Conv(x, whalf) d = Mul(k, root2) e = Erf(d) p = Mul(k, e) y = Add(k, p)",
            },
        ),
        "SiLU": (
            "sigmoid",
            {
                "sigmoid": "s = Sigmoid(h) y = Mul(h, s)",
                "tanh": "k = Conv(x, whalf) s = Tanh(k) p = Mul(k, s) y = Add(k, p)",
            },
        ),
        "hard swish": (
            "HardSwish",
            {
                "HardSwish": "y = HardSwish(h)",
                "HardSigmoid": "s = HardSigmoid<alpha=0.16666667, beta=0.5>(h) y = Mul(h, s)",
            },
        ),
        "soft shrinkage": (
            "minus its clip",
            {
                "minus its clip": "c = Clip(h, low, high) y = Sub(h, c)",
                "Shrink": "y = Shrink<bias=0.01, lambd=0.01>(h)",
                "two ReLUs": """a = Sub(h, high) b = Relu(a) c = Neg(h) d = Sub(c, high) e = Relu(d) y = Sub(b, e)""",
            },
        ),
    }
    for channels, side in ((96, 28), (192, 14)):
        kernel = weight(channels, channels, 1, 1)
        for name, (source, forms) in functions.items():
            yield Case(
                f"pointwise convolution, {name}",
                f"{channels}, {side} × {side}",
                f"float[1, {channels}, {side}, {side}] x",
                f"float[1, {channels}, {side}, {side}] y",
                source,
                {form: f"h = Conv(x, w) {nodes}" for form, nodes in forms.items()},
                {"w": kernel, "whalf": kernel / 2} | constants,
            )


def gates() -> Iterator[Case]:
    """Squeeze and excitation between convolutions."""
    for channels, squeezed, side in ((768, 192, 7), (1280, 320, 4), (112, 28, 14)):
        down, up = weight(squeezed, channels, 1, 1), weight(channels, squeezed, 1, 1)
        first, last = f"h = Conv<group={channels}, pads=[1,1,1,1]>(x, filters)", "z = Mul(h, g) y = Conv(z, w)"
        yield Case(
            "squeeze and excitation between convolutions",
            f"{channels}, {squeezed}, {side} × {side}",
            f"float[1, {channels}, {side}, {side}] x",
            f"float[1, 64, {side}, {side}] y",
            "mean, Conv",
            {
                "mean, Conv": f"{first} p = ReduceMean(h, axes) a = Conv(p, d) b = Relu(a) c = Conv(b, u) "
                f"g = Sigmoid(c) {last}",
                "pool, Gemm": f"{first} p = GlobalAveragePool(h) q = Flatten(p) a = Gemm<transB=1>(q, dm) b = Relu(a) "
                f"c = Gemm<transB=1>(b, um) s = Sigmoid(c) g = Reshape(s, pixel) {last}",
            },
            {
                "filters": weight(channels, 1, 3, 3),
                "d": down,
                "u": up,
                "dm": down[:, :, 0, 0],
                "um": up[:, :, 0, 0],
                "w": weight(64, channels, 1, 1),
                "axes": integers(2, 3),
                "pixel": integers(1, channels, 1, 1),
            },
        )


def splits() -> Iterator[Case]:
    """Queries, keys and values from one convolution, each through a depthwise one."""
    for channels, side in ((48, 56), (112, 14), (192, 7)):
        kernel = weight(3 * channels, channels, 1, 1)
        parts = dict(zip(("wq", "wk", "wv"), np.split(kernel, 3), strict=True))
        after = " ".join(f"{n}f = Conv<group={channels}, pads=[1,1,1,1]>({n}, filters)" for n in "qkv")
        last = f"{after} p = Mul(qf, kf) y = Add(p, vf)"
        yield Case(
            "queries, keys and values from one convolution",
            f"{channels}, {side} × {side}",
            f"float[1, {channels}, {side}, {side}] x",
            f"float[1, {channels}, {side}, {side}] y",
            "Split",
            {
                "Split": f"m = Conv(x, w, b) q, k, v = Split<axis=1>(m, sizes) {last}",
                "depthwise before Split": f"""m = Conv(x, w, b) f = Conv<group={3 * channels}, pads=[1,1,1,1]>(m, all)
                    qf, kf, vf = Split<axis=1>(f, sizes) p = Mul(qf, kf) y = Add(p, vf)""",
            },
            {
                "w": kernel,
                "b": weight(3 * channels),
                "filters": weight(channels, 1, 3, 3),
                "all": np.tile(weight(channels, 1, 3, 3), (3, 1, 1, 1)),
                "sizes": integers(channels, channels, channels),
            }
            | parts,
        )


def groups() -> Iterator[Case]:
    """Channel mixing in groups, as in frequency filters."""
    for channels, rows, columns in ((192, 32, 17), (320, 16, 9), (384, 8, 5)):
        count = 8
        kernel = weight(channels, channels // count, 1, 1)
        dense = np.zeros((channels, channels, 1, 1), np.float32)
        for part in np.split(np.arange(channels), count):
            dense[np.ix_(part, part)] = kernel[part]
        yield Case(
            "pointwise convolution in 8 groups",
            f"{channels}, {rows} × {columns}",
            f"float[1, {channels}, {rows}, {columns}] x",
            f"float[1, {channels}, {rows}, {columns}] y",
            "Conv",
            {
                "Conv": f"y = Conv<group={count}>(x, w)",
                "MatMul": "s = Reshape(x, batch) m = MatMul(wm, s) y = Reshape(m, image)",
                "dense Conv": "y = Conv(x, full)",
            },
            {
                "w": kernel,
                "wm": kernel.reshape(count, -1, channels // count),
                "full": dense,
                "batch": integers(count, channels // count, rows * columns),
                "image": integers(1, channels, rows, columns),
            },
        )


def transforms() -> Iterator[Case]:
    """The two real transforms of many maps: along their rows, then along their columns."""
    for channels, side in ((128, 32), (256, 16), (320, 8), (104, 16)):
        bins = side // 2 + 1
        across, down = weight(side, 2 * bins), weight(2 * side, 2 * side)
        rows = "r = Reshape(x, rows) m = MatMul(r, across) a = Reshape(m, halves)"
        yield Case(
            "transforms along rows and columns",
            f"{channels} maps of {side} × {side}",
            f"float[1, {channels}, {side}, {side}] x",
            f"float[{channels}, {2 * side}, {bins}] y",
            "each transposed",
            {
                "each transposed": f"""{rows} t = Transpose<perm=[0,2,1]>(a) b = Reshape(t, columns)
                    n = MatMul(b, down) c = Reshape(n, back) y = Transpose<perm=[0,2,1]>(c)""",
                "batch of products": f"""{rows} t = Transpose<perm=[0,2,1]>(a) n = MatMul(t, down)
                    y = Transpose<perm=[0,2,1]>(n)""",
                "matrix on the left": f"{rows} y = MatMul(left, a)",
                "channels last": """r = Reshape(x, flat) t = Transpose<perm=[1,0]>(r) u = Reshape(t, pixels)
                    m = MatMul(above, u) a = Reshape(m, wide) n = MatMul(left, a) c = Reshape(n, tall)
                    d = Transpose<perm=[1,0]>(c) y = Reshape(d, halves)""",
            },
            {
                "across": across,
                "above": np.ascontiguousarray(across.T),
                "down": down,
                "left": np.ascontiguousarray(down.T),
                "rows": integers(channels * side, side),
                "halves": integers(channels, 2 * side, bins),
                "columns": integers(channels * bins, 2 * side),
                "back": integers(channels, bins, 2 * side),
                "flat": integers(channels, side * side),
                "pixels": integers(side, side, channels),
                "wide": integers(2 * side, bins * channels),
                "tall": integers(2 * side * bins, channels),
            },
        )


CASES: tuple[Callable[[], Iterator[Case]], ...] = (
    sequences,
    flattened,
    depthwise,
    norms,
    activations,
    gates,
    splits,
    groups,
    transforms,
)


def measure(case: Case, threads: int) -> dict[str, list[float]]:
    """Seconds of each form, turn by turn.

    Raises:
        SystemExit: two forms do not compute the same.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    models = {form: model.SerializeToString() for form, model in case.models().items()}
    sessions = {form: ort.InferenceSession(model, options) for form, model in models.items()}
    (inputs,) = {tuple((value.name, tuple(value.shape)) for value in each.get_inputs()) for each in sessions.values()}
    feed = {name: np.random.default_rng(0).standard_normal(shape, np.float32) for name, shape in inputs}
    outputs = {form: session.run(None, feed)[0] for form, session in sessions.items()}
    for form, output in outputs.items():
        if np.linalg.norm(output - outputs[case.source]) > TOLERANCE * np.linalg.norm(outputs[case.source]):
            raise SystemExit(f"{case.question} ({case.shape}): {form} computes something else")
    for session in sessions.values():
        for _ in range(WARM_UP):
            session.run(None, feed)
    seconds: dict[str, list[float]] = {form: [] for form in sessions}
    end = time.perf_counter() + SECONDS * len(sessions)
    while time.perf_counter() < end or len(seconds[OURS]) < LEAST_TURNS:
        for form, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feed)
            seconds[form].append(time.perf_counter() - start)
    return seconds


def ratio(ours: list[float], other: list[float]) -> tuple[float, float, float]:
    """Median of other / ours within turns, and the 95 % interval of that median by order statistics."""
    ratios = sorted(b / a for a, b in zip(ours, other, strict=True))
    reach = 0.98 * math.sqrt(len(ratios))
    low, high = (round(len(ratios) / 2 + sign * reach) for sign in (-1, 1))
    return statistics.median(ratios), ratios[max(low, 0)], ratios[min(high, len(ratios) - 1)]


def run(threads: int, only: str) -> list[dict[str, object]]:
    """Results of all cases whose question or shape contains `only`."""
    rows: list[dict[str, object]] = []
    for case in (case for cases in CASES for case in cases()):
        if only.lower() not in f"{case.question} {case.shape}".lower():
            continue
        seconds = measure(case, threads)
        others = {form: ratio(seconds[OURS], values) for form, values in seconds.items() if form != OURS}
        rows.append(
            {
                "question": case.question,
                "shape": case.shape,
                "source": case.source,
                "microseconds": 1e6 * statistics.median(seconds[OURS]),
                "ratios": others,
            }
        )
    return rows


def in_own_process(threads: int, only: str) -> list[dict[str, object]]:
    """`run`, where no other session's threads are."""
    command = [sys.executable, __file__, "--json", "--threads", str(threads), "--only", only]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: list[dict[str, object]] = json.loads(output)
    return found


def table(results: Mapping[int, list[dict[str, object]]]) -> str:
    """Markdown: a row for each case and form."""
    heads = "".join(f" {threads} thread{'s' if threads > 1 else ''} |" for threads in results)
    lines = [f"| what | shape | form |{heads}", "| --- | --- | --- |" + " --- |" * len(results)]
    for rows in zip(*results.values(), strict=True):
        first = rows[0]
        ours = "".join(f" {row['microseconds']:.0f} µs |" for row in rows)
        lines.append(f"| {first['question']} | {first['shape']} | **{OURS}** |{ours}")
        for form in first["ratios"]:  # type: ignore[attr-defined]
            cells = "".join(" {:.2f} [{:.2f}, {:.2f}] |".format(*row["ratios"][form]) for row in rows)  # type: ignore[index]
            lines.append(f"| | | {form}{' (exported)' if form == first['source'] else ''} |{cells}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and write the page or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose question or shape contains this")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--check", action="store_true", help="fail where mobilemix's form is not the fastest")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(run(arguments.threads[0], arguments.only)))
        return
    results = {threads: in_own_process(threads, arguments.only) for threads in arguments.threads}
    text = table(results)
    print(text)
    if arguments.check:
        slower = [
            f"{row['question']}, {row['shape']}, {threads} threads: {form} takes {values[0]:.2f} of mobilemix's time"
            for threads, rows in results.items()
            for row in rows
            for form, values in row["ratios"].items()  # type: ignore[attr-defined]
            if values[2] < 1 / MARGIN
        ]
        raise SystemExit("\n".join(slower) if slower else 0)
    if not arguments.only:
        stated = f"ONNX Runtime {ort.__version__}, {platform.machine()}, Python {platform.python_version()}."
        marker = r"(<!-- forms -->\n).*(<!-- end -->)"
        page = PAGE.read_text()
        table_of = f"{stated}\n\n{text}\n"
        PAGE.write_text(re.sub(marker, lambda found: found[1] + table_of + found[2], page, flags=re.DOTALL))


if __name__ == "__main__":
    main()
