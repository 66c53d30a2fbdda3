"""Which operations of a finished package can be compressed, and which stay as they are.

A layer is a convolution or a `linear` with constant weights. These can be compressed; where the layer is int8, the
value that it reads is rounded, too. Layers have the names that they have in every target, `module/value`.

What stays in floating point, and why:

- DFT matrices and the masks that sum decays of scans: many operations share each of them, so that all together take a
  few kilobytes, and an error in one is an error in every pixel;
- the values of layers that read a spectrum: its first coefficient is larger than most by a factor of the image's side,
  so that one scale for all leaves few steps to the others. The weights of such layers are compressed;
- the values of depthwise convolutions: one scale for channels that no weights mix;
- the values of layers that read one vector, as heads and gates of channels do: they take as long as their weights take
  to read, and a vector of means has few numbers to tell its range by;
- softmax, norms, means, gates, products of two values, such as attention's scores and what a state-space mixer writes
  and reads, and recurrences of scans, in whose states an error stays: Core ML has no 8-bit form of them;
- sums of residual branches, which go on in floating point to norms and further sums;
- biases, tables, and weights of fewer than `LEAST` elements: scales and palettes would take what they save.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import cast

from torch import fx

from mobilemix.passes.editing import EXACT
from mobilemix.targets.base import Lowered
from mobilemix.targets.coreml.package import Operation, Package

LEAST = 256
"""Elements of the smallest weight that is compressed."""

_NORMS = ("layer_norm", "instance_norm", "batch_norm", "l2_norm")
_HALF = "_cast_fp16"


@dataclasses.dataclass(frozen=True)
class Layer:
    """An operation whose weights are constant.

    Attributes:
        name: "module/value".
        module: path of the module of the user's that it comes from, "" for the outermost.
        operation: it, in the package.
        weight: name of the constant, (output channels, input channels of a group, …).
        shape: of the weight.
        value: name of the value that it reads, if that may be rounded.
    """

    name: str
    module: str
    operation: Operation
    weight: str
    shape: tuple[int, ...]
    value: str | None


def layers(package: Package, lowered: Lowered) -> list[Layer]:
    """The layers of a package, in execution order.

    Args:
        package: as `mobilemix.targets.coreml.convert.convert` wrote it, in float32 or float16.
        lowered: what it was converted from.
    """
    constants = {each.outputs[0].name: each.outputs[0].shape for each in package.operations if each.type == "const"}
    nodes = _nodes(lowered)
    made = _made(lowered)
    spectra: set[str] = set()  # values with few numbers that are much larger than the others
    found = []
    for operation in package.operations:
        read = {
            bound
            for argument in operation.inputs.values()
            for bound in argument
            if isinstance(bound, str) and bound not in constants
        }
        (weight,) = operation.inputs.get("weight", (None,))
        if operation.type not in ("conv", "linear") or weight not in constants or not read:
            if read and spectra.issuperset(read) and operation.type not in _NORMS:
                spectra.update(each.name for each in operation.outputs)
            continue
        output = operation.outputs[0].name
        value = output.removesuffix(_HALF)
        node = nodes.get(value)
        (activation,) = read
        if (node is not None and made.intersection(_origins(node))) or activation in spectra:
            spectra.add(output)
        if node is not None and made.intersection(_origins(node)):
            continue
        shape = cast(tuple[int, ...], constants[weight])
        if math.prod(shape) >= LEAST:
            module = _module(node)
            depthwise = operation.type == "conv" and shape[1] == 1
            stays = depthwise or activation in spectra or _positions(operation) == 1
            name = f"{module}/{value}" if module else value
            found.append(Layer(name, module, operation, weight, shape, None if stays else activation))
    return found


def _positions(operation: Operation) -> int:
    """For how many columns of numbers a layer multiplies its weights."""
    shape = operation.outputs[0].shape
    places = shape[2:] if operation.type == "conv" else shape[:-1]
    return math.prod(size or 0 for size in places)


def _nodes(lowered: Lowered) -> dict[str, fx.Node]:
    """Nodes of the program by the names that a package has for their values."""
    nodes = {node.name: node for node in lowered.program.graph.nodes}
    results = zip(lowered.output_names, lowered.program.graph_signature.user_outputs, strict=True)
    return nodes | {name: nodes[str(result)] for name, result in results}


def _made(lowered: Lowered) -> frozenset[str]:
    """Names of the placeholders of matrices that passes made."""
    specs = lowered.program.graph_signature.input_specs
    return frozenset(spec.arg.name for spec in specs if str(spec.target).startswith(EXACT))


def _origins(node: fx.Node) -> Iterator[str]:
    """Names of the placeholders that a node reads, as they are or moved about."""
    for each in node.all_input_nodes:
        while each.op == "call_function" and len(each.all_input_nodes) == 1:
            (each,) = each.all_input_nodes
        yield each.name


def _module(node: fx.Node | None) -> str:
    stack = [] if node is None else [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    return stack[-1] if stack else ""
