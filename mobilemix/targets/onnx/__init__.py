"""The ONNX target: one checked `.onnx` file that ONNX Runtime, and whatever reads ONNX, can run."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mobilemix.errors import TargetError
from mobilemix.parity import relative_l2
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Check, Inputs, Lowered, Runner
from mobilemix.targets.onnx.convert import check, write
from mobilemix.targets.onnx.runtime import OnnxRunner, read_model

OPTIMISATION_TOLERANCE = 1e-5
"""Largest relative L2 distance between ONNX Runtime with and without its graph optimisations: rounding alone."""


class OnnxTarget:
    """See `mobilemix.targets.base.Target`."""

    name = "onnx"
    suffix = ".onnx"
    precisions = ("fp32",)
    takes_images = False

    def compile(self, lowered: Lowered, recipe: Recipe, destination: Path) -> None:
        """Write the file; see `convert.write`."""
        write(lowered, recipe, destination)

    def load(self, path: Path) -> Runner:
        """Open in ONNX Runtime; raises as `OnnxRunner` does."""
        return OnnxRunner(path)

    def checks(self, lowered: Lowered, recipe: Recipe, path: Path, samples: Sequence[Inputs]) -> list[Check]:  # noqa: ARG002
        """The file is valid, needs nothing but standard operators, and survives ONNX Runtime's own optimisations."""
        return [_valid(path), _standard(path), _optimisable(path, samples)]

    def op_histogram(self, path: Path) -> dict[str, int]:
        """Occurrences by operator type."""
        return dict(sorted(Counter(node.op_type for node in read_model(path).graph.node).items()))


def _valid(path: Path) -> Check:
    try:
        check(path)
    except TargetError as error:
        return Check("onnx.checker", False, str(error))
    return Check("onnx.checker", True, "valid, all shapes inferred")


def _standard(path: Path) -> Check:
    model = read_model(path)
    others = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    (opset,) = (entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    detail = f"operators of {', '.join(others)}" if others else f"ai.onnx opset {opset} only"
    return Check("standard operators", not others and not model.functions, detail)


def _optimisable(path: Path, samples: Sequence[Inputs]) -> Check:
    plain, optimised = OnnxRunner(path, optimised=False), OnnxRunner(path)
    error = max(
        (
            relative_l2(value, expected[name])
            for sample in samples
            for expected in [plain.run(sample)]
            for name, value in optimised.run(sample).items()
        ),
        default=0.0,
    )
    held = error <= OPTIMISATION_TOLERANCE
    return Check(
        "ONNX Runtime with and without optimisation", held, f"relative L2 {error:.1e} of {OPTIMISATION_TOLERANCE:.0e}"
    )
