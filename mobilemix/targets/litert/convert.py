"""Lowered program → `.tflite` file: convert with litert-torch, name, make smaller, describe, write."""

import functools
import re
from pathlib import Path

import torch
from torch.export import ExportedProgram

from mobilemix.errors import TargetError, UnsupportedOpError, first_line
from mobilemix.passes.base import source
from mobilemix.quantization.data import calibration
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Lowered
from mobilemix.targets.litert import flatbuffer, metadata
from mobilemix.targets.litert.flatbuffer import Model
from mobilemix.targets.litert.quantize import Layer, to_half, to_int8
from mobilemix.targets.litert.quiet import load_converter, quiet
from mobilemix.targets.litert.runtime import SIGNATURE

_MISSING = re.compile(r"Lowering not found: (\S+)")


def write(lowered: Lowered, recipe: Recipe, destination: Path) -> None:
    """Write `lowered` as a LiteRT model; the same program and recipe give the same bytes.

    Raises:
        UnsupportedOpError: an operator that LiteRT has none for.
        TargetError: litert-torch refused the graph.
        InputError: int8 for a model that there is nothing to calibrate on.
    """
    # First: what cannot be calibrated should not cost a conversion.
    samples = calibration(lowered, recipe.quantization) if recipe.precision == "int8" else []
    content = float_build(lowered.program, lowered.input_names, lowered.output_names)
    if samples:
        content = to_int8(content, samples, recipe.quantization, layers_of(lowered))
    model = flatbuffer.parse(content)
    if recipe.precision != "fp32":
        to_half(model)  # of an int8 model what it computes in float32
    metadata.describe(model, lowered)
    destination.write_bytes(metadata.with_labels(flatbuffer.pack(model), lowered.labels))


@functools.lru_cache(maxsize=1)  # the checks of a file want what it was made from
def float_build(program: ExportedProgram, input_names: tuple[str, ...], output_names: tuple[str, ...]) -> bytes:
    """The program as a float32 model without metadata; raises as `write` does."""
    load_converter()
    from mobilemix.targets.litert.converter import to_flatbuffer

    try:
        with quiet():
            content = to_flatbuffer(program, input_names, output_names)
    except Exception as error:
        if missing := _MISSING.search(str(error)):
            raise UnsupportedOpError(_describe_missing(program, missing[1])) from error
        raise TargetError(f"litert-torch cannot convert the graph: {first_line(error)}") from error
    model = flatbuffer.parse(content)
    _name_values(model, program)
    return flatbuffer.pack(model)


def layers_of(lowered: Lowered) -> dict[str, Layer]:
    """Names of values in the file → the layer that computes them."""
    layers = {}
    for node in lowered.program.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        module = stack[-1][0] if stack else ""
        layers[node.name] = Layer(f"{module}/{node.name}" if module else node.name, module)
    values = lowered.program.graph_signature.user_outputs
    outputs = {f"{SIGNATURE}_{name}_output": value for name, value in zip(lowered.output_names, values, strict=True)}
    return layers | {name: layers[value] for name, value in outputs.items() if value in layers}


def _describe_missing(program: ExportedProgram, name: str) -> str:
    """Name the operator and the line that asks for it, which is found where torch decomposes nothing on the way."""
    from litert_torch import fx_infra

    with quiet():
        decomposed = program.run_decompositions(fx_infra.decomp.pre_lower_decomp())
    places = [source(node) for node in decomposed.graph.nodes if str(node.target) == name]
    place = f" at {places[0]}" if places else ""
    return f"LiteRT has no form of {name}{place}; write it with other operators"


def _name_values(model: Model, program: ExportedProgram) -> None:
    """Give values the names of the nodes that they are, which the converter puts in front of a number.

    Of several values that stand for one node the last that has its shape is it; others keep the number.
    """
    shapes = {
        node.name: tuple(node.meta["val"].shape)
        for node in program.graph.nodes
        if isinstance(node.meta.get("val"), torch.Tensor)
    }
    graph = model.subgraphs[0]
    last: dict[str, int] = {}
    for index in (int(output) for each in graph.operators for output in each.outputs):
        name = flatbuffer.text(graph.tensors[index].name).split(";")[0]
        if shapes.get(name) == flatbuffer.shape(graph.tensors[index]):
            last[name] = index
    for name, index in last.items():
        graph.tensors[index].name = name.encode()
