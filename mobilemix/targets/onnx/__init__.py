"""The ONNX target: one checked `.onnx` file that ONNX Runtime, and whatever reads ONNX, can run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from mobilemix.passes import lower_scans
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Check, Inputs, Lowered, Runner
from mobilemix.targets.onnx import checks, convert, quantized, scans
from mobilemix.targets.onnx.runtime import OnnxRunner, histogram


class OnnxTarget:
    """See `mobilemix.targets.base.Target`."""

    name = "onnx"
    suffix = ".onnx"
    precisions = ("fp32", "fp16", *quantized.PRECISIONS)
    takes_images = False
    stored_dtypes: Mapping[str, str] = MappingProxyType({})
    passes = lower_scans(stays=scans.is_faster)

    def compile(self, lowered: Lowered, recipe: Recipe, destination: Path) -> None:
        """Write the file; see `convert.write` and `quantized.write`."""
        (quantized if recipe.precision in quantized.PRECISIONS else convert).write(lowered, recipe, destination)

    def load(self, path: Path) -> Runner:
        """Open in ONNX Runtime; raises as `OnnxRunner` does."""
        return OnnxRunner(path)

    def checks(self, lowered: Lowered, recipe: Recipe, path: Path, samples: Sequence[Inputs]) -> list[Check]:
        """The file is valid, needs nothing but standard operators, and survives ONNX Runtime's own optimisations.

        A float16 file must also be the rounded float32 one.
        """
        precision = recipe.precision or self.precisions[0]
        found = [checks.valid(path), checks.standard(path)]
        if precision in checks.OPTIMISATION_TOLERANCE:
            found.append(checks.optimisable(path, precision, samples))
        if precision in quantized.PRECISIONS:
            found += quantized.proofs(lowered, recipe, path, samples)
        elif precision == "fp16":
            found += checks.rounding(lowered, recipe, path, samples)
        return found

    def op_histogram(self, path: Path) -> dict[str, int]:
        """Occurrences by operator type."""
        return histogram(path)
