"""Lowered program → ONNX file in the form that NVIDIA's parser takes → engine."""

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import onnx_ir as ir

from mobilemix import files
from mobilemix.errors import InputError
from mobilemix.quantization.data import calibration
from mobilemix.recipe import CALIBRATED, LEAST_OPSETS, Recipe, opset_of
from mobilemix.targets.base import Lowered
from mobilemix.targets.onnx.convert import write as write_onnx
from mobilemix.targets.onnx.convert import write_changed
from mobilemix.targets.onnx.products import Product, kept
from mobilemix.targets.onnx.rewrites import (
    END,
    START,
    Step,
    apply,
    channel_layer_norm,
    gelu,
    global_average_pool,
    image_convs,
    settle,
)
from mobilemix.targets.tensorrt import bindings, builder
from mobilemix.targets.tensorrt.bindings import Flavour
from mobilemix.targets.tensorrt.preflight import OPSETS, preflight
from mobilemix.targets.tensorrt.quantize import Kind, layers, quantize
from mobilemix.targets.tensorrt.refusals import unsupported


def sort_top_k(model: ir.Model) -> None:
    """Ask for the largest elements in their order: without, any order is right, and TensorRT knows this one alone."""
    for node in model.graph.all_nodes():
        if node.op_type == "TopK":
            node.attributes.pop("sorted", None)


STEPS: tuple[Step, ...] = (
    *START,
    # What TensorRT has a layer of its own for, which sums in float32, or fuses by its shape.
    apply(gelu.RULES, global_average_pool.RULES, channel_layer_norm.RULES[:1]),
    apply(channel_layer_norm.RULES[1:2]),
    apply(channel_layer_norm.RULES[2:]),
    # It has no convolution of sequences: the parser would put every one between two reshapes.
    settle(image_convs.NORMS),
    settle(image_convs.CONVS),
    settle(image_convs.RESHAPES),
    sort_top_k,
    *END,
)
"""Rewrites that are right for any runtime.

The others of `mobilemix.targets.onnx.rewrites` are forms that ONNX Runtime's CPU kernels were measured to prefer:
matrix products of short sequences, channels in multiples of four, parts of convolutions, large heads as convolutions.
TensorRT measures its own kernels, and their layouts, when it builds.
"""

PARSER = "TensorRT"


def write(lowered: Lowered, recipe: Recipe, destination: Path) -> None:
    """Write the ONNX file; the same program and recipe give the same bytes.

    Every value has the type that it is computed in, casts included: a strongly typed network keeps to it.

    Raises:
        UnsupportedOpError: an operator that ONNX or NVIDIA's parser has none for.
        InputError, TargetError: see `mobilemix.targets.onnx.convert.write`.
    """
    # Convolutions in bfloat16 need an opset that only newer parsers than that of the list read.
    newest = max(OPSETS.stop - 1, LEAST_OPSETS.get(str(recipe.precision), 0))
    if opset_of(recipe) > newest:
        raise InputError(f"{PARSER} reads opsets up to {newest}, not {recipe.opset}; leave out --opset")
    if recipe.precision in CALIBRATED:
        samples, kind = calibration(lowered, recipe.quantization), cast(Kind, recipe.precision)
        change = functools.partial(quantize, samples=samples, kind=kind, options=recipe.quantization)
        write_changed(lowered, recipe, destination, STEPS, change)
    else:
        write_onnx(lowered, recipe, destination, STEPS)
    if refusals := preflight(destination):
        raise unsupported(refusals, destination, lowered.program, PARSER)


def layers_of(recipe: Recipe, lost: Collection[str]) -> Callable[[ir.Graph], Iterable[Product]] | None:
    """Which products of the float32 graph the recipe's precision quantises, but for what reads a lost value.

    None if it is none that does.
    """
    if recipe.precision not in CALIBRATED:
        return None
    return lambda graph: layers(graph, kept(graph, recipe.quantization), lost)


def build(lowered: Lowered, recipe: Recipe, model: Path, flavour: Flavour) -> Mapping[str, Any]:
    """Build an engine of the ONNX file beside it, where that can be done here.

    Returns:
        What the manifest says of it; without an engine the reason.

    Raises:
        UnsupportedOpError: the parser does not take a node.
        TargetError: the builder failed.
        MissingDependencyError: TensorRT for RTX, without its extra.
    """
    # TensorRT for RTX needs no GPU: what keeps it from building is an error, said by the builder.
    if flavour == "tensorrt" and (reason := builder.can_build(flavour)) is not None:
        return {"files": {}, "reason": reason}
    options = options_of(recipe)
    engine, log = engine_path(model), engine_path(model).with_suffix(".log")
    try:
        built = builder.build(model, engine, log, flavour, options)
    except builder.Refused as error:
        raise unsupported(error.refusals, model, lowered.program, builder.NAMES[flavour]) from error
    asked = {field: value for field, value in dataclasses.asdict(options).items() if getattr(recipe, field, None)}
    return {
        "files": {engine.name: files.sha256(engine)},
        "log": log.name,
        "bytes": built.bytes,
        "seconds": round(built.seconds, 3),
        "builder": built.builder,
        "device": device(flavour),
        "options": asked,
        "layers": dict(Counter(layer.precision for layer in built.layers).most_common()),
    }


def options_of(recipe: Recipe) -> builder.BuildOptions:
    """What a recipe asks of the builder."""
    return builder.BuildOptions(
        workspace_mb=recipe.workspace_mb,
        timing_cache=recipe.timing_cache,
        hardware_compatibility=cast(Any, recipe.hardware_compatibility or "none"),
        version_compatible=recipe.version_compatible,
        batch=recipe.dynamic_batch,
    )


def engine_path(model: Path) -> Path:
    """Where the engine of `NAME.tensorrt.onnx` is: `NAME.tensorrt.engine`."""
    return model.with_suffix(".engine")


def device(flavour: Flavour) -> str:
    """What an engine was built for."""
    return "no GPU: built ahead of time" if flavour == "tensorrt-rtx" else bindings.gpu_name()
