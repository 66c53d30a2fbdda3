"""The ONNX target: one checked `.onnx` file that ONNX Runtime, and whatever reads ONNX, can run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from mobilemix.passes import lower_scans
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Check, Inputs, Lowered, Runner
from mobilemix.targets.onnx import checks, scans
from mobilemix.targets.onnx.convert import write
from mobilemix.targets.onnx.runtime import OnnxRunner, histogram


class OnnxTarget:
    """See `mobilemix.targets.base.Target`."""

    name = "onnx"
    suffix = ".onnx"
    precisions = ("fp32", "fp16")
    takes_images = False
    stored_dtypes: Mapping[str, str] = MappingProxyType({})
    passes = lower_scans(stays=scans.is_faster)

    def compile(self, lowered: Lowered, recipe: Recipe, destination: Path) -> None:
        """Write the file; see `convert.write`."""
        write(lowered, recipe, destination)

    def load(self, path: Path) -> Runner:
        """Open in ONNX Runtime; raises as `OnnxRunner` does."""
        return OnnxRunner(path)

    def checks(self, lowered: Lowered, recipe: Recipe, path: Path, samples: Sequence[Inputs]) -> list[Check]:
        """The file is valid, needs nothing but standard operators, and survives ONNX Runtime's own optimisations.

        A float16 file must also be the rounded float32 one.
        """
        precision = recipe.precision or self.precisions[0]
        found = [checks.valid(path), checks.standard(path), checks.optimisable(path, precision, samples)]
        return found + (checks.rounding(lowered, recipe, path, samples) if precision == "fp16" else [])

    def op_histogram(self, path: Path) -> dict[str, int]:
        """Occurrences by operator type."""
        return histogram(path)
