"""Int8 for ONNX Runtime's CPU kernels: which nodes compute in integers, and the pairs that say so.

ONNX Runtime makes an integer kernel of a node whose inputs are dequantised and whose output is quantised again
(products of matrices may leave theirs in float). It stays in integers from one such node to the next, and pays for each
way in and out: 0.13 ns a number either way on an AVX512-VNNI core, where a 1×1 convolution of 64 channels takes 0.6 ns
for each of its outputs in integers, and 1.7 in float32. Measured there, with ONNX Runtime 1.32:

- products with constant weights gain 2.3 to 3.3 times, from `LEAST_CHANNELS` input channels on; with fewer (a stem of
  three, groups of 16) they gain nothing or lose half;
- depthwise convolutions of 3×3 are as fast as in float32, those of 7×7 take 1.7 times as long. They compute in
  integers where they lie between nodes that do, which saves the ways out and in;
- so do products and sigmoids of such values, concatenations and pools: each alone is a loss, all together a gain;
- what moves numbers about moves a quarter of the bytes;
- Relu after a node costs nothing: the zero point clips.

In float32 stay, besides: norms, softmax, GELU, means, recurrences and Fourier transforms, for their ranges; products of
two activations, whose kernel of two unsigned operands is no faster than float32's; the products that
`products.roundable` leaves out; and sums of branches: in integers, the residual stream loses what is clipped of it for
good. On a trained CAS-ViT that saves a tenth of the time, and has three times the error.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from mobilemix.errors import InputError
from mobilemix.passes.editing import WIDE
from mobilemix.quantization.affine import Grid, from_integers, to_integers
from mobilemix.quantization.moments import Moments
from mobilemix.quantization.options import Quantization
from mobilemix.quantization.rounding import bias_correction
from mobilemix.targets.base import Inputs
from mobilemix.targets.onnx.floats import keep_floats
from mobilemix.targets.onnx.formats import FORMATS, zeros
from mobilemix.targets.onnx.observation import Ranges, held, layer_moments, lost_of, ranges
from mobilemix.targets.onnx.pairs import Pairs, name_nodes, own
from mobilemix.targets.onnx.products import Product, integers_of, kept, largest, roundable
from mobilemix.targets.onnx.rewrites.constants import constant
from mobilemix.targets.onnx.runtime import read_model

OBSERVER = "percentile"
"""Where the recipe names none. Of 1324 answers of four trained classifiers 3 are others than those of float32; whole
ranges and entropy change 6, moving averages and least squares 7."""

UNHELD = "float_values"
"""Metadata of a file: the values that 8 bits do not hold, a JSON list of names."""

LEAST_CHANNELS = 17
"""Input channels of a convolution, in each group, from which integers are faster."""
LARGEST_DEPTHWISE = 3
"""Side of a depthwise kernel up to which they are not slower."""

CARRIERS = ("Mul", "Sigmoid", "Concat", "GlobalAveragePool")
"""Operators that compute in integers between nodes that do."""
MOVEMENTS = ("Reshape", "Transpose", "Split", "Slice", "Squeeze", "Unsqueeze", "Flatten", "MaxPool")
"""Operators whose outputs are numbers of their input."""
_FLOAT_OUTPUTS = ("Gemm", "MatMul")
"""Integer kernels that can leave their output in float."""

_INT32 = np.iinfo(np.int32)


@dataclasses.dataclass(frozen=True)
class Placement:
    """What of a graph computes in integers.

    Attributes:
        layers: products with weights that do, in the graph's order.
        nodes: all nodes that do.
        grids: values that are rounded, in the graph's order, each with the value whose grid it has: its own, but for
            what is moved.
        everywhere: those of them whose float form no node reads.
    """

    layers: tuple[Product, ...]
    nodes: frozenset[ir.Node]
    grids: Mapping[ir.Value, ir.Value]
    everywhere: frozenset[ir.Value]

    @property
    def observed(self) -> frozenset[str]:
        """Names of the values whose ranges have to be known."""
        return frozenset(str(value.name) for value in self.grids.values())


def quantize(source: Path, destination: Path, samples: Sequence[Inputs], options: Quantization) -> None:
    """Write a float32 file again with the products of `place` in 8 bits.

    Before:   x → Conv(w, b) → Relu → y
    After:    x → QuantizeLinear → DequantizeLinear → Conv(DequantizeLinear(w'), DequantizeLinear(b')) → Relu
              → QuantizeLinear → DequantizeLinear → y

    Args:
        source: ONNX, float32, opset 19 or newer.
        destination: where to write.
        samples: typical inputs.
        options: how to quantise.

    Raises:
        InputError: there is nothing to quantise.
    """
    model = ir.load(source)
    left = kept(model.graph, options)
    if not place(model.graph, left).layers:
        raise InputError(f"{source.name} has no convolution or product with constant weights to quantise; use fp16")
    seen = held_ranges(source, samples, options, left)
    placement = place(model.graph, left, lost_of(seen))
    if not placement.layers:
        raise InputError(f"8 bits hold no value that the products of {source.name} read; use fp16, or --observer")
    nodes = list(model.graph)
    insert(model, seen, options, left, layer_moments(source, placement.layers, samples, options))
    name_nodes(model.graph, nodes)
    ir.save(model, destination)


def held_ranges(source: Path, samples: Sequence[Inputs], options: Quantization, left: Collection[str]) -> Ranges:
    """Range of every value that `place(graph, left)` rounds; (0, 0) for those that stay in float, see `held`.

    Args:
        source: ONNX, float32.
        samples: typical inputs.
        options: observer and format.
        left: names of the products that stay in float.
    """
    names = place(ir.load(source).graph, left).observed
    found = ranges(source, names, samples, options.observer or OBSERVER, symmetric=False)
    form = Quantization(format=options.format)
    change = functools.partial(insert, options=form, left=left)
    return held(source, found, samples, change, options.format, *sorted(left))


def insert(
    model: ir.Model,
    seen: Ranges,
    options: Quantization,
    left: Collection[str] = (),
    known: Mapping[str, Moments] | None = None,
) -> None:
    """Put pairs around the nodes of `place(model.graph, left)`, in place.

    Args:
        model: float32.
        seen: range of every value that `Placement.observed` names, (0, 0) for those that stay in float, which the
            model's metadata tells; more do no harm.
        options: format, rounding of weights, correction of biases; patterns in `layers` are the caller's to resolve.
        left: names of the products that stay in float.
        known: moments of the layers' inputs, by name, where the options need them.
    """
    lost = lost_of(seen)
    graph, placement, form = model.graph, place(model.graph, left, lost), FORMATS[options.format]
    if lost:
        model.metadata_props[UNHELD] = json.dumps(sorted(lost))
    pairs, order = Pairs(graph), list(graph)
    follower = dict(itertools.pairwise(order))
    grids: dict[ir.Value, Grid] = {}  # of dequantised values
    for value, root in placement.grids.items():
        grid = form.activation(*seen[str(root.name)])
        users, producer = list(value.uses()), value.producer()
        scale, zero = pairs.parameters(str(root.name), grid.scale, zeros(grid))
        rounded = pairs.of_value(value, scale, zero, order[0] if producer is None else follower[producer])
        grids[rounded] = grid
        for user, index in users:
            if value in placement.everywhere or user in placement.nodes or _moves(user, placement):
                user.replace_input_with(index, rounded)
    for layer in placement.layers:
        _round_weights(layer, pairs, grids[_read(layer)], options, (known or {}).get(layer.name))
    weighted = {layer.node for layer in placement.layers}
    for node in placement.nodes - weighted:
        for index, operand in enumerate(node.inputs):
            if operand is not None and operand.is_initializer():
                content = constant(operand)
                grid = form.activation(float(content.min()), float(content.max()))
                name = own(operand, node)
                numbers = to_integers(content, grid)
                node.replace_input_with(index, pairs.of_constant(name, numbers, grid.scale, zeros(grid), node))
    keep_floats(graph, placement.nodes)
    common.RemoveUnusedNodesPass()(model)


def _read(layer: Product) -> ir.Value:
    value = layer.node.inputs[1 - layer.place]
    assert value is not None
    return value


def _moves(node: ir.Node, placement: Placement) -> bool:
    return node.op_type in MOVEMENTS and any(value in placement.grids for value in node.outputs)


def _round_weights(layer: Product, pairs: Pairs, read: Grid, options: Quantization, known: Moments | None) -> None:
    """Replace a product's weight and bias by integers; the bias has the scale of the products that it is added to."""
    form, node, content = FORMATS[options.format], layer.node, constant(layer.weight)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    added = None if bias is None else constant(bias).reshape(-1)
    magnitudes = largest(content, layer.axis)
    if added is not None:  # a bias has half of 32 bits, so that the sum of products that is added to it has the other
        magnitudes = np.maximum(magnitudes, np.abs(added) * (127 * 2 / _INT32.max / float(read.scale)))
    grid = form.weight(magnitudes, layer.axis)
    integers = integers_of(layer, content, grid, options, known)
    # Without zero points, ONNX Runtime 1.32 makes no integer kernel of a Gemm.
    held = pairs.of_constant(own(layer.weight, node), integers, grid.scale, zeros(grid), node, axis=layer.axis)
    node.replace_input_with(layer.place, held)
    if bias is not None:
        assert added is not None
        if options.bias_correction and known is not None:
            numbers = from_integers(integers, grid)
            added = added + bias_correction(layer.rows(content), layer.rows(numbers), known)
        scale = (read.scale * grid.scale).astype(np.float32)
        sums = np.clip(np.rint(added.astype(np.float64) / scale), _INT32.min, _INT32.max).astype(np.int32)
        node.replace_input_with(2, pairs.of_constant(own(bias, node), sums, scale, None, node, axis=0))


def stated_lost(path: Path) -> list[str]:
    """Names of the values that stay in float in a file, because 8 bits do not hold them."""
    stated = {entry.key: entry.value for entry in read_model(path).metadata_props}
    return list(json.loads(stated.get(UNHELD, "[]")))


def place(graph: ir.Graph, left: Collection[str] = (), lost: Collection[str] = ()) -> Placement:
    """Which nodes of a float32 graph compute in integers.

    Args:
        graph: of a float32 file.
        left: names of products that stay in float.
        lost: names of values that do, and with them what reads and what computes them.
    """
    return _Placer(graph, left, lost).placement()


class _Placer:
    """`nodes` shrinks until each carrier in it reads and is read by nodes in it."""

    def __init__(self, graph: ir.Graph, left: Collection[str], lost: Collection[str]) -> None:
        self._graph, self._lost = graph, lost
        fast = (each for each in roundable(graph) if each.name not in left and _is_fast(each))
        weighted = {each.node: each for each in fast if not self._is_lost(each.node)}
        outputs = set(graph.outputs)
        self._layers = weighted
        carriers = {node for node, each in weighted.items() if each.depthwise}
        carriers |= {node for node in graph if _is_carrier(node) and not self._is_lost(node)}
        self.nodes = {
            node
            for node in carriers | set(weighted)
            if node.op_type in _FLOAT_OUTPUTS or outputs.isdisjoint(node.outputs)
        }
        while isolated := {node for node in carriers & self.nodes if not self._is_between(node)}:
            self.nodes -= isolated

    def placement(self) -> Placement:
        grids: dict[ir.Value, ir.Value] = {value: value for value in self._graph.inputs if self._is_wanted(value)}
        everywhere: set[ir.Value] = set()
        for node in self._graph:
            for value in node.outputs:
                if value.dtype != ir.DataType.FLOAT or value.is_graph_output():
                    continue
                if self._is_made(value):
                    everywhere.add(value)
                elif node.op_type in MOVEMENTS and (
                    node.inputs[0] in everywhere or any(map(self._is_wanted, node.outputs))
                ):
                    everywhere.add(value)
                    assert node.inputs[0] is not None
                    grids[value] = grids[node.inputs[0]]
                    continue
                elif node in self.nodes or not self._is_wanted(value):
                    continue
                grids[value] = value
        layers = tuple(each for node, each in self._layers.items() if node in self.nodes)
        return Placement(layers, frozenset(self.nodes), grids, frozenset(everywhere))

    def _is_lost(self, node: ir.Node) -> bool:
        """Whether a node reads or computes what 8 bits do not hold, moved or clipped or not."""
        clipped = (user.outputs[0] for user, _ in node.outputs[0].uses() if user.op_type == "Relu")
        values = [*node.inputs, node.outputs[0], *clipped]
        return any(value is not None and str(_unmoved(value).name) in self._lost for value in values)

    def _is_between(self, node: ir.Node) -> bool:
        computed = (value for value in node.inputs if value is not None and not value.is_initializer())
        return self._is_wanted(node.outputs[0]) and all(self._origin(value) in self.nodes for value in computed)

    def _origin(self, value: ir.Value) -> ir.Node | None:
        """The node that computed a value before it was moved, or clipped by what costs nothing."""
        node = value.producer()
        while node is not None and (node.op_type in MOVEMENTS or self._is_absorbed(node)):
            assert node.inputs[0] is not None
            node = node.inputs[0].producer()
        return node

    def _is_wanted(self, value: ir.Value) -> bool:
        """Whether a node computes in integers with it, or with it moved or clipped."""
        return any(
            user in self.nodes
            or (self._is_absorbed(user) and self._is_wanted(user.outputs[0]))
            or (user.op_type in MOVEMENTS and index == 0 and any(map(self._is_wanted, user.outputs)))
            for user, index in value.uses()
        )

    def _is_made(self, value: ir.Value) -> bool:
        """Whether a node computes it in integers, and has to round it; not what goes straight to a Relu."""
        node, users = value.producer(), value.uses()
        assert node is not None
        if self._is_absorbed(node):
            return True
        if node not in self.nodes or not users or any(self._is_absorbed(user) for user, _ in users):
            return False
        return node.op_type not in _FLOAT_OUTPUTS or self._is_wanted(value)

    def _is_absorbed(self, node: ir.Node) -> bool:
        """Whether a node is a Relu that the rounding of its input does as well."""
        if node.op_type != "Relu" or node.inputs[0] is None or node.outputs[0].is_graph_output():
            return False
        producer = node.inputs[0].producer()
        return producer in self.nodes and len(node.inputs[0].uses()) == 1 and not node.inputs[0].is_graph_output()


def _unmoved(value: ir.Value) -> ir.Value:
    """The value that was moved, where one was: what it is rounded to is decided there."""
    node = value.producer()
    while node is not None and node.op_type in MOVEMENTS and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return value


def _is_fast(layer: Product) -> bool:
    if layer.node.op_type != "Conv":
        return True
    if layer.depthwise:
        return max(map(int, layer.weight.shape[2:])) <= LARGEST_DEPTHWISE
    return int(layer.weight.shape[1]) >= LEAST_CHANNELS


def _is_carrier(node: ir.Node) -> bool:
    floats = all(value is None or value.dtype == ir.DataType.FLOAT for value in node.inputs)
    return node.op_type in CARRIERS and floats and not str(node.outputs[0].name).startswith(WIDE)
