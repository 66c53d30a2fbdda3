"""Choices of layers to compress, of one float package that is written and planned once and then executed in memory."""

import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from mobilemix.errors import UnknownNameError
from mobilemix.quantization import sensitivity
from mobilemix.quantization.sensitivity import Run
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Array, Inputs, Lowered
from mobilemix.targets.coreml.compress import simulated
from mobilemix.targets.coreml.convert import convert
from mobilemix.targets.coreml.layers import Layer, layers
from mobilemix.targets.coreml.package import Package, read_package
from mobilemix.targets.coreml.plan import LEAST_IOS, Plan, check_options, planned
from mobilemix.targets.coreml.target import PackageRunner


class Candidates:
    """See `mobilemix.quantization.sensitivity.Quantizable`; all is executed by mobilemix, in float16."""

    measured = 16

    def __init__(self, lowered: Lowered, recipe: Recipe, folder: Path) -> None:
        """Write the float package and plan the whole of it.

        Args:
            lowered: what is compiled.
            recipe: of the artifact.
            folder: for the float package, as long as candidates are asked for.

        Raises:
            UnknownNameError: a precision that compresses nothing.
            MobilemixError: see `CoreMLTarget.compile`.
        """
        if recipe.precision not in LEAST_IOS:
            raise UnknownNameError("precision to mix with float", str(recipe.precision), LEAST_IOS)
        check_options(recipe)
        source = folder / "float.mlpackage"
        convert(lowered, dataclasses.replace(recipe, precision="fp16"), source)
        self._package = read_package(source)
        self._plan = planned(self._package, lowered, recipe, PackageRunner(self._package))
        self._layers = {
            layer.name: layer for layer in layers(self._package, lowered) if layer.weight in self._plan.weights
        }
        self.layers = [_described(layer) for layer in self._layers.values()]

    def reference(self, watched: Sequence[str] = ()) -> Run:
        """See `Quantizable`; the float16 package."""
        return _run(self._package, watched)

    def runner(self, float_layers: Collection[str], watched: Sequence[str] = ()) -> Run:
        """See `Quantizable`."""
        kept = [self._layers[name] for name in float_layers]
        return _run(simulated(self._package, _without(self._plan, kept)), watched)


def _without(plan: Plan, kept: Sequence[Layer]) -> Plan:
    """A plan that leaves layers as they are; weights that they share with others, too."""
    shared = {layer.weight for layer in kept}
    readers = {layer.operation.outputs[0].name for layer in kept}
    values = {
        name: dataclasses.replace(rounded, readers=rounded.readers - readers)
        for name, rounded in plan.values.items()
        if rounded.readers - readers
    }
    return Plan({name: form for name, form in plan.weights.items() if name not in shared}, values)


def _run(package: Package, watched: Sequence[str]) -> Run:
    runner = PackageRunner(package)

    def run(inputs: Inputs) -> dict[str, Array]:
        names = {*runner.outputs, *watched}
        found = {name: np.asarray(value, np.float32) for name, value in runner.values(inputs) if name in names}
        return {name: found[name] for name in (*runner.outputs, *watched)}

    return run


def _described(layer: Layer) -> sensitivity.Layer:
    output = layer.operation.outputs[0]
    sizes = [size for size in output.shape or () if isinstance(size, int)]
    return sensitivity.Layer(
        name=layer.name,
        module=layer.module,
        output=output.name,
        multiply_adds=math.prod(sizes) * math.prod(layer.shape[1:]),
        weight_bytes=4 * math.prod(layer.shape),
    )
