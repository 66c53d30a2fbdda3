"""The LiteRT target: one `.tflite` file for Android, the browser and CPUs, of operators that XNNPACK runs.

Importing this module needs no LiteRT; compiling and running do (`pip install 'mobilemix[litert]'`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from mobilemix.passes import lower_scans
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Check, Inputs, Lowered, Runner
from mobilemix.targets.litert.passes import PASSES


class LiteRTTarget:
    """See `mobilemix.targets.base.Target`."""

    name = "litert"
    suffix = ".tflite"
    # float32 first: every runtime computes it alike. A float16 file is half as large, and computed in float32 by CPUs.
    precisions = ("fp32", "fp16", "int8")
    takes_images = False
    stored_dtypes: Mapping[str, str] = MappingProxyType({"int64": "int32"})
    passes = (*lower_scans(), *PASSES)

    def compile(self, lowered: Lowered, recipe: Recipe, destination: Path) -> None:
        """Write the file; see `convert.write`."""
        from mobilemix.targets.litert.convert import write

        write(lowered, recipe, destination)

    def load(self, path: Path) -> Runner:
        """Open in LiteRT's interpreter; raises as `LiteRTRunner` does."""
        from mobilemix.targets.litert.runtime import LiteRTRunner

        return LiteRTRunner.from_file(path)

    def checks(self, lowered: Lowered, recipe: Recipe, path: Path, samples: Sequence[Inputs]) -> list[Check]:
        """The file needs nothing but builtin operators, and holds the weights that it should; see `checks`."""
        from mobilemix.targets.litert import checks

        return checks.run(lowered, recipe, path, samples)

    def op_histogram(self, path: Path) -> dict[str, int]:
        """Occurrences by operator type."""
        from mobilemix.targets.litert.flatbuffer import histogram, read_model

        return histogram(read_model(path))
