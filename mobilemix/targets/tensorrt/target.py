"""The TensorRT targets: an ONNX file in the form that NVIDIA's parser takes, and an engine where one can be built.

`tensorrt` builds for the GPU of the machine that exports; without one it writes the ONNX file and says what was not
checked. `tensorrt-rtx` builds ahead of time, with no GPU, for every RTX GPU since Ampere.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mobilemix.passes import lower_scans
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Check, Inputs, Lowered, Runner
from mobilemix.targets.onnx.runtime import OnnxRunner, histogram
from mobilemix.targets.tensorrt import checks, convert
from mobilemix.targets.tensorrt.bindings import Flavour


class TensorRTTarget:
    """See `mobilemix.targets.base.Target`."""

    name: Flavour = "tensorrt"
    suffix = ".tensorrt.onnx"
    # float16 first: twice as fast as float32 on the GPUs that TensorRT runs on, and what float16 cannot hold stays.
    precisions = ("fp16", "fp32", "bf16", "int8", "fp8")
    takes_images = False
    stored_dtypes: Mapping[str, str] = MappingProxyType({})
    # A Scan or Loop is built step by step, with a synchronisation after each.
    passes = lower_scans()

    def compile(self, lowered: Lowered, recipe: Recipe, destination: Path) -> Mapping[str, Any]:
        """Write the ONNX file, and the engine and its log beside it; see `convert`."""
        convert.write(lowered, recipe, destination)
        return convert.build(lowered, recipe, destination, self.name)

    def load(self, path: Path) -> Runner:
        """Open the ONNX file in ONNX Runtime, to round where the file says; raises as `OnnxRunner` does."""
        # Its optimisations are not TensorRT's. (That of version 1.32 drops a Relu in front of 8-bit floats.)
        return OnnxRunner(path, optimised=False)

    def checks(self, lowered: Lowered, recipe: Recipe, path: Path, samples: Sequence[Inputs]) -> list[Check]:
        """The file is what NVIDIA's parser takes; what could be built was, and what could be run agrees."""
        return checks.run(lowered, recipe, path, samples, self.name)

    def op_histogram(self, path: Path) -> dict[str, int]:
        """Occurrences by operator type."""
        return histogram(path)


class TensorRTForRTXTarget(TensorRTTarget):
    """The same for TensorRT for RTX."""

    name: Flavour = "tensorrt-rtx"
    suffix = ".rtx.onnx"
