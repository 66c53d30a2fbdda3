"""Choices of layers to quantise, of one float32 graph that is written and observed once and then mixed in memory."""

import dataclasses
import glob
import json
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mobilemix.errors import UnknownNameError
from mobilemix.quantization.data import calibration
from mobilemix.quantization.options import FLOAT
from mobilemix.quantization.sensitivity import Layer, Run
from mobilemix.recipe import Recipe, opset_of
from mobilemix.targets.base import Array, Inputs, Lowered
from mobilemix.targets.onnx import dynamic, weights
from mobilemix.targets.onnx.convert import write
from mobilemix.targets.onnx.observation import layer_moments, lost_of
from mobilemix.targets.onnx.products import Product, kept, product
from mobilemix.targets.onnx.quantize import held_ranges, insert
from mobilemix.targets.onnx.quantized import PRECISIONS, layers

TIMED = 10
"""Runs of which a node's time is the median."""


class Candidates:
    """See `mobilemix.quantization.sensitivity.Quantizable`."""

    measured = 64

    def __init__(self, lowered: Lowered, recipe: Recipe, folder: Path) -> None:
        """Write the float32 graph and observe its values.

        Args:
            lowered: what is compiled.
            recipe: of the artifact.
            folder: for the float32 graph, as long as candidates are asked for.

        Raises:
            UnknownNameError: a precision that the search does not mix.
            MobilemixError: see `write`.
        """
        if recipe.precision not in PRECISIONS:
            raise UnknownNameError("ONNX precision to mix with float", str(recipe.precision), PRECISIONS)
        self._path, self._recipe = folder / f"{lowered.name}.onnx", recipe
        write(lowered, dataclasses.replace(recipe, precision="fp32", opset=opset_of(recipe)), self._path)
        self._samples = calibration(lowered, recipe.quantization)
        graph = ir.load(self._path).graph
        if recipe.precision == "int8":
            self._left = kept(graph, recipe.quantization)
            self._ranges = held_ranges(self._path, self._samples, recipe.quantization, self._left)
            found = list(layers(graph, recipe, lost_of(self._ranges)))
            self._moments = layer_moments(self._path, found, self._samples, recipe.quantization)
        else:
            found = list(layers(graph, recipe))
        seconds = node_seconds(self._path, self._samples[0])
        self.layers = [_layer(product, seconds) for product in found]

    def reference(self, watched: Sequence[str] = ()) -> Run:
        """See `Quantizable`."""
        return _run(onnx.load(self._path), watched)

    def runner(self, float_layers: Collection[str], watched: Sequence[str] = ()) -> Run:
        """See `Quantizable`."""
        make = self._in_integers if self._recipe.precision == "int8" else self._written
        return _run(make(float_layers), watched)

    def _in_integers(self, float_layers: Collection[str]) -> onnx.ModelProto:
        """With the ranges and moments that were observed once."""
        model = ir.load(self._path)
        insert(model, self._ranges, self._recipe.quantization, self._left.union(float_layers), self._moments)
        return ir.to_proto(model)

    def _written(self, float_layers: Collection[str]) -> onnx.ModelProto:
        """As the file is; these precisions need no range."""
        options = self._recipe.quantization
        more = tuple((glob.escape(name), FLOAT) for name in float_layers)
        options = dataclasses.replace(options, layers=(*options.layers, *more))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, self._path.name)
            if self._recipe.precision == "int8-dynamic":
                dynamic.quantize(self._path, path, self._samples, options)
            else:
                weights.quantize(self._path, path, self._samples, options, str(self._recipe.precision))
            return onnx.load(path)


def _run(model: onnx.ModelProto, watched: Sequence[str]) -> Run:
    """A model in memory in ONNX Runtime, on one thread: samples run side by side on all cores."""
    outputs = {value.name for value in model.graph.output}
    more = [name for name in dict.fromkeys(watched) if name not in outputs]
    model.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, more))
    session = ort.InferenceSession(model.SerializeToString(), _options(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(inputs: Inputs) -> dict[str, Array]:
        values = session.run(names, dict(inputs))
        return {name: np.asarray(value, np.float32) for name, value in zip(names, values, strict=True)}

    return run


def node_seconds(path: Path, sample: Inputs) -> dict[str, float]:
    """What ONNX Runtime's profiler says that each node takes on one thread, by the name of its first output.

    Nodes that were fused into others have no time of their own.
    """
    options = _options()
    options.enable_profiling, options.profile_file_prefix = True, str(path.with_suffix(""))
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for _ in range(TIMED + 1):  # the first run is slower
        session.run(None, dict(sample))
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith(_TIME):
            times[_value(event["name"])].append(event["dur"] / 1e6)
    return {name: statistics.median(found) for name, found in times.items()}


_TIME = "_kernel_time"


def _value(event: str) -> str:
    """Of "module/value_nchwc_kernel_time", the value: what the node is called after its layout was changed."""
    return event.removesuffix(_TIME).removesuffix("_nchwc").rpartition("/")[2]


def _layer(product: Product, seconds: Mapping[str, float]) -> Layer:
    output, weight = product.node.outputs[0], product.weight.const_value
    assert weight is not None
    sizes = [size for size in output.shape or () if isinstance(size, int)]
    return Layer(
        name=product.name,
        module=product.module,
        output=str(output.name),
        multiply_adds=math.prod(sizes) * weight.size // weight.shape[product.axis],
        weight_bytes=weight.nbytes,
        seconds=_time(output, seconds),
    )


def _time(value: ir.Value, seconds: Mapping[str, float]) -> float | None:
    """Of the node that computes a value, which is called as what was fused into it: an activation, a sum."""
    while str(value.name) not in seconds:
        users = [user for user, _ in value.uses()]
        if len(users) != 1 or product(users[0]) is not None:
            return None
        value = users[0].outputs[0]
    return seconds[str(value.name)]


def _options() -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return options
