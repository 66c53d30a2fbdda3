"""Smaller numbers: a float32 LiteRT model as the float16 or the int8 one."""

import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from mobilemix.quantization import cache
from mobilemix.quantization.observers import OBSERVERS, Observer
from mobilemix.quantization.options import FLOAT, Quantization, check_patterns, precision_of
from mobilemix.targets.base import LARGEST_HALF, Array, Inputs
from mobilemix.targets.litert import flatbuffer
from mobilemix.targets.litert.flatbuffer import Model
from mobilemix.targets.litert.quiet import quiet, silent
from mobilemix.targets.litert.runtime import SIGNATURE, LiteRTRunner

HALF_SUFFIX = "_float16"
"""Of the names of tensors that hold the rounded numbers of another."""

SMALLEST_HALF = 32
"""Elements below which a constant stays float32: an operator that widens it would be larger than what it saves."""

INTEGER = (
    *("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "MUL", "LOGISTIC"),
    *("CONCATENATION", "PAD", "RESHAPE", "SLICE", "TRANSPOSE"),
)
"""Operators that an int8 model computes in integers."""

OBSERVER = "min-max"
"""Of values, unless another is asked for."""

_STATISTICS = frozenset({"ADD", "MEAN", "MUL", "RESHAPE", "RSQRT", "SQUARED_DIFFERENCE", "SQUARE", "SUB", "SUM"})
"""What a normalisation computes its scale with, up to the subtraction of the mean."""


class Layer(NamedTuple):
    """What computes a value: its name, "module/value", and its module's path."""

    name: str
    module: str


def to_half(model: Model) -> None:
    """Store float32 constants as float16, each with a DEQUANTIZE in front of who reads it.

    This is LiteRT's float16 form: CPUs widen the weights once, when they load the model, and compute in float32; GPUs
    and others that have float16 kernels drop the operator and compute in float16. A constant that float16 cannot hold
    stays as it is.
    """
    graph = model.subgraphs[0]
    widened = []
    for index, (tensor, value) in _constants(model):
        if value.size < SMALLEST_HALF or np.abs(value[np.isfinite(value)]).max(initial=0) > LARGEST_HALF:
            continue
        half = schema.TensorT(
            shape=tensor.shape,
            type=schema.TensorType.FLOAT16,
            buffer=len(model.buffers),
            name=tensor.name + HALF_SUFFIX.encode(),
            hasRank=tensor.hasRank,
        )
        model.buffers.append(schema.BufferT(data=value.astype(np.float16).reshape(-1).view(np.uint8)))
        tensor.buffer = 0
        widened.append(
            schema.OperatorT(opcodeIndex=len(model.operatorCodes), inputs=[len(graph.tensors)], outputs=[index])
        )
        graph.tensors.append(half)
    if widened:
        code = schema.BuiltinOperator.DEQUANTIZE
        model.operatorCodes.append(schema.OperatorCodeT(deprecatedBuiltinCode=code, builtinCode=code, version=3))
        graph.operators = widened + graph.operators
    _drop_unused_buffers(model)


def to_int8(content: bytes, samples: Sequence[Inputs], options: Quantization, layers: Mapping[str, Layer]) -> bytes:
    """Compute in 8-bit integers what XNNPACK has integer kernels for: weights symmetric by channel, values by tensor.

    Inputs and outputs stay float32, and so do normalisations, whose squares and inverse roots span more than 8 bits
    hold, and attention's softmax and products, for which XNNPACK has no integer kernels. Values keep the whole range
    that the samples show, unless another observer is asked for. (ai-edge-quantizer's own calibration averages the
    ranges of samples, which clips: the trained flowers classifier then agrees with float32 on 88% of its validation
    pictures, and on 96% with this.)

    Args:
        content: a float32 model.
        samples: typical inputs.
        options: the observer, and layers that stay in float.
        layers: what computes its values, by their names.
    """
    with quiet():
        from ai_edge_quantizer import qtyping
        from ai_edge_quantizer.algorithm_manager import AlgorithmName
        from ai_edge_quantizer.quantizer import Quantizer

        quantizer = Quantizer(bytearray(content))
        operations = qtyping.TFLOperationName
        for name in INTEGER:
            quantizer.add_static_config(".*", operations[name], activation_num_bits=8, weight_num_bits=8)
        for boundary in (operations.INPUT, operations.OUTPUT):
            quantizer.update_quantization_recipe(".*", boundary, algorithm_key=AlgorithmName.NO_QUANTIZE)
        model = flatbuffer.parse(content)
        if names := sorted(_normalisations(model) | kept(model, options, layers)):
            within = f"^({'|'.join(map(re.escape, names))});?$"
            quantizer.update_quantization_recipe(
                within, operations.ALL_SUPPORTED, algorithm_key=AlgorithmName.NO_QUANTIZE
            )
    seen = ranges(content, samples, options.observer or OBSERVER)
    with silent():  # of two progress bars one cannot be turned off
        result = quantizer.quantize(seen, enable_progress_bar=False, enable_progress_report=False).quantized_model
    assert result is not None
    return bytes(result)


def kept(model: Model, options: Quantization, layers: Mapping[str, Layer]) -> set[str]:
    """Names of the values of the operators that are to stay in float.

    An operator is the layer that its output is named after, which for a convolution with a ReLU is the ReLU.
    """
    check_patterns(options, ((layer.name, layer.module) for layer in layers.values()))
    graph = model.subgraphs[0]
    found = set()
    for name in (flatbuffer.text(graph.tensors[each.outputs[0]].name) for each in graph.operators):
        layer = layers.get(name.split(";")[0])
        if layer is not None and precision_of(options, "int8", layer.name, layer.module) == FLOAT:
            found.add(name)
    return found


def ranges(content: bytes, samples: Sequence[Inputs], observer: str) -> dict[str, dict[str, Array]]:
    """Smallest and largest number to represent of each tensor of a float32 model, as arrays of its rank.

    Of constants these are the smallest and largest that they hold, of values what an observer of the samples chooses.
    """
    runner = LiteRTRunner(content)
    graph = runner.model.subgraphs[0]
    ranks = {flatbuffer.text(tensor.name): len(flatbuffer.shape(tensor)) for tensor in graph.tensors}

    def compute() -> dict[str, tuple[float, float]]:
        observers: defaultdict[str, Observer] = defaultdict(OBSERVERS[observer])
        (signature,) = (each for each in runner.model.signatureDefs if flatbuffer.text(each.signatureKey) == SIGNATURE)
        inputs = {
            flatbuffer.text(each.name): flatbuffer.text(graph.tensors[each.tensorIndex].name)
            for each in signature.inputs
        }
        for sample in samples:
            for name, value in sample.items():
                observers[inputs[name]].observe(value)
            for name, value in runner.values(sample):
                observers[name].observe(value)
        return {name: each.range(symmetric=False) for name, each in observers.items()}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "float32.tflite")
        path.write_bytes(content)
        found = cache.ranges(path, samples, observer, False, compute)
    for _, (tensor, value) in _constants(runner.model):
        if value.size:
            found[flatbuffer.text(tensor.name)] = float(value.min()), float(value.max())
    return {
        name: {
            end: np.full((1,) * ranks[name], value, np.float32) for end, value in zip(("min", "max"), ends, strict=True)
        }
        for name, ends in found.items()
    }


def _normalisations(model: Model) -> set[str]:
    """Names of the values of each normalisation: from x minus its mean to the product with the inverse root."""
    graph = model.subgraphs[0]
    makers = {int(output): each for each in graph.operators for output in each.outputs}
    found: set[int] = set()
    for root in graph.operators:
        if flatbuffer.operator(model, root) != "RSQRT":
            continue
        found |= {int(each.outputs[0]) for each in graph.operators if int(root.outputs[0]) in map(int, each.inputs)}
        queue = [int(root.outputs[0])]
        while queue:
            value = queue.pop()
            maker = makers.get(value)
            if maker is None or value in found or flatbuffer.operator(model, maker) not in _STATISTICS:
                continue
            found.add(value)
            if flatbuffer.operator(model, maker) != "SUB":
                queue += map(int, maker.inputs)
    return {flatbuffer.text(graph.tensors[index].name) for index in found}


def _constants(model: Model) -> Iterator[tuple[int, tuple[Any, Array]]]:
    """Float32 tensors that the file holds."""
    graph = model.subgraphs[0]
    for index in range(len(graph.tensors)):
        tensor = graph.tensors[index]
        if flatbuffer.dtype(tensor) == "float32" and (value := flatbuffer.constant(model, tensor)) is not None:
            yield index, (tensor, value)


def _drop_unused_buffers(model: Model) -> None:
    """Leave out what nothing refers to any more; buffer 0 stays, the empty one of every file."""
    users = [tensor for graph in model.subgraphs for tensor in graph.tensors] + list(model.metadata or [])
    used = sorted({0, *(user.buffer for user in users)})
    moved = {old: new for new, old in enumerate(used)}
    for user in users:
        user.buffer = moved[user.buffer]
    model.buffers = [model.buffers[index] for index in used]
