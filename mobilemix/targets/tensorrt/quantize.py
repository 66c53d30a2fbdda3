"""Quantised graphs: QuantizeLinear and DequantizeLinear pairs, which TensorRT makes 8-bit kernels of.

What is quantised are the inputs of convolutions and of matrix products with constant weights: activations with one
scale for each tensor, weights with one for each output channel, all symmetric about zero, as TensorRT demands. Biases
are not: kernels add them to wide sums. Outputs are not either: TensorRT fuses the quantisation of the next layer's
input into the kernel where it can. This is what NVIDIA advises
(https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/quantized-types-explicit-quantization.html).

What stays in floating point, and why:

- depthwise convolutions: a few multiply-adds for each number that they read, which tensor cores have no use for, and
  one scale for channels that no weights mix: on the trained flowers classifier, a third of int8's error;
- softmax, norms, means and gates: few multiply-adds, and ranges that 8 bits do not hold;
- products of two activations, such as attention's scores and what a state-space mixer writes and reads: neither side
  has channels that could have scales of their own;
- DFT matrices: the first coefficient of a spectrum is larger than most by a factor of the image's side, so that one
  scale for all leaves few steps to the others: on the trained flowers classifier, a third more error;
- recurrences of scans: an error in a state stays in all later ones;
- what reads one of these before a norm or a residual sum: few of its numbers are much larger than the others;
- sums of residual branches, which go on in floating point to norms and further sums.

What stays is float16: with float32 around the 8-bit products the trained flowers classifier answers no better.
"""

import functools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from mobilemix.errors import InputError
from mobilemix.quantization.options import Quantization
from mobilemix.recipe import LEAST_OPSETS
from mobilemix.targets.base import Array, Inputs
from mobilemix.targets.onnx.half import halve
from mobilemix.targets.onnx.observation import Ranges, held, lost_of, ranges
from mobilemix.targets.onnx.pairs import SCALE, Pairs, name_nodes
from mobilemix.targets.onnx.products import Product, kept, largest, roundable
from mobilemix.targets.onnx.quantize import UNHELD
from mobilemix.targets.onnx.rewrites.constants import constant

Kind = Literal["int8", "fp8"]

_TYPES: Mapping[str, ir.DataType] = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}
_OBSERVERS = {"int8": "mse", "fp8": "min-max"}
"""Where the recipe names none. In int8 the few largest numbers are clipped, so that the others have finer steps: on the
trained flowers classifier that takes a third of the error away. 8-bit floats are finer for smaller numbers as it is."""

_LARGEST = {"int8": 127.0, "fp8": 448.0}
"""Largest magnitude of each type; −128 would make the range of int8 asymmetric."""


def quantize(source: Path, destination: Path, samples: Sequence[Inputs], kind: Kind, options: Quantization) -> None:
    """Write a float32 file again with 8-bit products, and float16 around them.

    Before:   x → Conv(w, b) → y
    After:    x → Cast → QuantizeLinear → DequantizeLinear → Conv(DequantizeLinear(w.quantised), b.half) → Cast → y

    Args:
        source: ONNX, float32, opset 19 or newer.
        destination: where to write.
        samples: typical inputs.
        kind: int8, or 8-bit floats of 4 bits of exponent and 3 of significand ("fp8", E4M3).
        options: observer, and layers that stay.

    Raises:
        InputError: the opset is older, or there is nothing to quantise.
    """
    model = ir.load(source)
    least = LEAST_OPSETS[kind]
    if model.opset_imports[""] < least:
        raise InputError(
            f"{kind} with float16 scales needs opset {least}, {source.name} has {model.opset_imports['']}; "
            f"export with --opset {least} or newer"
        )
    left = kept(model.graph, options)
    names = {str(each.activation.name) for each in layers(model.graph, left)}
    if not names:
        raise InputError(f"{source.name} has no convolution or product with constant weights to quantise; use fp16")
    nodes = list(model.graph)
    found = ranges(source, names, samples, options.observer or _OBSERVERS[kind], symmetric=True)
    seen = found
    if kind == "int8":  # the range of 8-bit floats is wide enough for any value
        seen = held(source, found, samples, functools.partial(insert, kind=kind, left=left), *sorted(left))
    if lost_of(seen) >= names:
        raise InputError(f"8 bits hold no value that the products of {source.name} read; use fp16, or --observer")
    insert(model, seen, kind, left)
    halve(model)
    name_nodes(model.graph, nodes)
    ir.save(model, destination)


def layers(graph: ir.Graph, left: Collection[str] = (), lost: Collection[str] = ()) -> Iterator[Product]:
    """Products to quantise: not the depthwise, those named in `left`, nor those that read a value named in `lost`."""
    for each in roundable(graph):
        if not each.depthwise and each.name not in left and str(each.activation.name) not in lost:
            yield each


def insert(model: ir.Model, seen: Ranges, kind: Kind, left: Collection[str] = ()) -> None:
    """Put a pair in front of each activation and each weight of `layers`, in place; scales are float32.

    Args:
        model: float32.
        seen: range of every activation, by name, symmetric; (0, 0) for those that stay in float, which the model's
            metadata tells.
        kind: see `quantize`.
        left: names of the products that stay in float.
    """
    lost = lost_of(seen)
    if lost:
        model.metadata_props[UNHELD] = json.dumps(sorted(lost))
    pairs = Pairs(model.graph)
    zero = pairs.constant(f"zero.{kind}", np.zeros((), _TYPES[kind].numpy()))
    made: dict[ir.Value, ir.Value] = {}
    for layer in list(layers(model.graph, left, lost)):
        node, activation, weight = layer.node, layer.activation, layer.weight
        if activation not in made:
            _, highest = seen[str(activation.name)]
            scale = pairs.constant(f"{activation.name}{SCALE}", step(np.array(highest), kind))
            made[activation] = pairs.of_value(activation, scale, zero, node, centred=True)
        if weight not in made:
            numbers, scales = by_channel(constant(weight), layer.axis, kind)
            made[weight] = pairs.of_constant(str(weight.name), numbers, scales, None, node, axis=layer.axis)
        node.replace_input_with(layer.place, made[weight])
        node.replace_input_with(1 - layer.place, made[activation])
    common.RemoveUnusedNodesPass()(model)


def step(magnitude: Array, kind: Kind) -> Array:
    """Scale at which a magnitude is the type's largest: rounded up to a number of float16, so that none is beyond."""
    exact = np.where(magnitude > 0, magnitude, 1.0) / _LARGEST[kind]
    rounded = exact.astype(np.float16)
    up: Array = np.where(rounded < exact, np.nextafter(rounded, np.float16(np.inf)), rounded)
    return up.astype(np.float32)


def quantised(content: Array, scale: Array, kind: Kind) -> Array:
    """Nearest multiples of the scale, ties to even, as far as the type goes."""
    multiples: Array = np.clip(content / scale, -_LARGEST[kind], _LARGEST[kind])
    return (np.rint(multiples) if kind == "int8" else multiples).astype(_TYPES[kind].numpy())


def by_channel(content: Array, axis: int, kind: Kind) -> tuple[Array, Array]:
    """A weight in 8 bits, and the scale of each channel along an axis."""
    scale = step(largest(content, axis), kind)
    shape = [-1 if other == axis else 1 for other in range(content.ndim)]
    return quantised(content, scale.reshape(shape), kind), scale
