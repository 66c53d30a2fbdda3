"""The quantised precisions of the ONNX target: what makes the file of each, and which of its products it changes."""

import functools
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import onnx_ir as ir

from mobilemix.quantization.data import calibration
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Check, Inputs, Lowered
from mobilemix.targets.onnx import checks, dynamic, quantize, weights
from mobilemix.targets.onnx.convert import write_changed
from mobilemix.targets.onnx.products import Product, kept
from mobilemix.targets.onnx.rewrites import PASSES
from mobilemix.targets.onnx.simulation import simulated

PRECISIONS = ("int8", "int8-dynamic", "w8", "w4")


def write(lowered: Lowered, recipe: Recipe, destination: Path) -> None:
    """Write the float32 file, quantised.

    Raises:
        InputError: data that does not fit, or nothing to quantise.
        MobilemixError: see `mobilemix.targets.onnx.convert.write`.
    """
    write_changed(lowered, recipe, destination, PASSES, functools.partial(_quantize, lowered, recipe))


def layers(graph: ir.Graph, recipe: Recipe, lost: Collection[str] = ()) -> Iterable[Product]:
    """Products of a float32 graph that are quantised in the file of a recipe.

    Args:
        graph: float32.
        recipe: of the file.
        lost: names of values that stay in float whatever the recipe says; see `quantize.place`.
    """
    options, precision = recipe.quantization, str(recipe.precision)
    if precision == "int8":
        return quantize.place(graph, kept(graph, options), lost).layers
    if precision == "int8-dynamic":
        return dynamic.layers(graph, options)
    return [each for each, _ in weights.layers(graph, options, precision)]


def proofs(lowered: Lowered, recipe: Recipe, path: Path, samples: Sequence[Inputs]) -> list[Check]:
    """The file is the float32 one, rounded where it should be, and ONNX Runtime's kernels compute what it says."""
    restore = dynamic.in_float if recipe.precision == "int8-dynamic" else None
    lost = quantize.stated_lost(path)
    chosen = functools.partial(layers, recipe=recipe, lost=lost)
    found = checks.rounding(lowered, recipe, path, samples, layers=chosen, restore=restore)
    return [*found, *unheld_check(lost), simulated(path, str(recipe.precision), samples)]


def unheld_check(lost: Collection[str]) -> list[Check]:
    """What a reader of the verification should know of the values that stay in float."""
    detail = f"{len(lost)} that 8 bits do not hold stay in float: {', '.join(lost)}"
    return [Check("values in 8 bits", True, detail)] if lost else []


def _quantize(lowered: Lowered, recipe: Recipe, source: Path, destination: Path) -> None:
    options, precision = recipe.quantization, str(recipe.precision)
    is_shown = precision == "int8" or options.rounding != "nearest" or options.bias_correction
    samples = calibration(lowered, options) if is_shown else []
    if precision == "int8":
        quantize.quantize(source, destination, samples, options)
    elif precision == "int8-dynamic":
        dynamic.quantize(source, destination, samples, options)
    else:
        weights.quantize(source, destination, samples, options, precision)
