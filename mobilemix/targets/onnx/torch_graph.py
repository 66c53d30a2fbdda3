"""ONNX files as PyTorch graphs: what a file means, computed without the runtime that is to be checked by it.

Each node becomes a call of a rule (`mobilemix.targets.onnx.onnx_ops`), so the graph of a quantised file rounds where
the file says so, and nowhere else: in float64 every product and sum of 8-bit integers is exact.
"""

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch import Tensor, fx, nn

from mobilemix.errors import InputError, UnsupportedOpError
from mobilemix.quantization.drift import Probe
from mobilemix.targets.base import Array, Inputs
from mobilemix.targets.onnx.onnx_ops import RULES, SEVERAL
from mobilemix.targets.onnx.onnx_ops.base import keywords
from mobilemix.targets.onnx.onnx_ops.control import NARROW, WIDE
from mobilemix.targets.onnx.onnx_ops.quantized import FLOAT8
from mobilemix.targets.onnx.runtime import read_model

_NAME = "onnx"
"""Key of a node's metadata that holds the name of its value in the file."""

_HALF_BYTES = {onnx.TensorProto.INT4: np.int8, onnx.TensorProto.UINT4: np.uint8}


def simulate(path: Path, dtype: torch.dtype = torch.float64) -> "Simulated":
    """Read a file as a PyTorch graph that computes in `dtype`.

    Raises:
        InputError: missing, corrupt, or not ONNX.
        UnsupportedOpError: an operator, or an attribute of one, without a rule.
    """
    model = read_model(path)
    onnx.load_external_data_for_model(model, str(path.parent))
    return simulate_graph(model.graph, dtype)


def simulate_graph(graph: onnx.GraphProto, dtype: torch.dtype) -> "Simulated":
    """The same of a graph in memory."""
    return Simulated(_Builder(dtype).build(graph), dtype)


class Simulated:
    """An ONNX file in PyTorch (see `mobilemix.targets.base.Runner`).

    Attributes:
        module: the graph; its inputs are tensors in the file's order, its outputs a dict.
        outputs: their names.
    """

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype) -> None:
        """Take a graph whose floats are of `dtype`."""
        self.module = module
        self._dtype = dtype
        self._inputs = [node.meta[_NAME] for node in module.graph.nodes if node.op == "placeholder"]
        (outputs,) = module.graph.output_node().args
        assert isinstance(outputs, Mapping)
        self.outputs = list(outputs)

    def run(self, inputs: Inputs) -> dict[str, Array]:
        """Execute; outputs by name, float32.

        Raises:
            InputError: the inputs' names are not the model's.
        """
        outputs, _ = self.follow(inputs, {}, ())
        return {name: value.astype(np.float32) for name, value in outputs.items()}

    def values(self, inputs: Inputs) -> Iterator[tuple[str, Array]]:
        """Every floating-point value that a node computes, in the file's order, float32; raises as `run`."""
        names = [
            node.meta[_NAME] for node in self.module.graph.nodes if node.op == "call_function" and _NAME in node.meta
        ]
        run = _Run(self.module, {}, names)
        run.run(*self._tensors(inputs))
        for name, value in run.kept.items():
            if value.is_floating_point():
                yield name, value.to(torch.float32).numpy()

    def follow(
        self, inputs: Inputs, given: Mapping[str, Array], keep: Collection[str]
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """Execute with some values given: whoever reads one gets it in place of what its node computes.

        Args:
            inputs: as for `run`, which raises the same.
            given: values by name.
            keep: names of values.

        Returns:
            The outputs, and what nodes compute of each value to keep, both as wide as the module computes.
        """
        run = _Run(self.module, {name: torch.from_numpy(value) for name, value in given.items()}, keep)
        outputs = run.run(*self._tensors(inputs))
        return {name: value.numpy() for name, value in outputs.items()}, {
            name: value.numpy() for name, value in run.kept.items()
        }

    def probed(self, inputs: Inputs, probe: Probe, given: Mapping[str, Tensor]) -> list[Tensor]:
        """Execute with gradients; the outputs, every rounding to a constant scale being one of the probe's points.

        A point has the name of the scale, which all have that are rounded alike. Values are `given` as for `follow`.
        """
        outputs: Mapping[str, Tensor] = _Probed(self.module, probe, given).run(*self._tensors(inputs))
        return list(outputs.values())

    def _tensors(self, inputs: Inputs) -> list[Tensor]:
        if set(inputs) != set(self._inputs):
            raise InputError(f"the model takes {', '.join(self._inputs)}, not {', '.join(inputs)}")
        tensors = (torch.from_numpy(np.array(inputs[name], order="C")) for name in self._inputs)
        return [tensor.to(self._dtype) if tensor.is_floating_point() else tensor for tensor in tensors]


class _Run(fx.Interpreter):
    """One execution; several of one module may be under way."""

    def __init__(self, module: fx.GraphModule, given: Mapping[str, Tensor], keep: Collection[str]) -> None:
        super().__init__(module)
        self._given, self._keep = given, frozenset(keep)
        self.kept: dict[str, Tensor] = {}
        """What nodes computed, by the names of the values in the file."""

    def run(self, *args: Any, **options: Any) -> Any:
        with torch.no_grad():
            return super().run(*args, **options)

    def run_node(self, n: fx.Node) -> Any:
        result, name = super().run_node(n), n.meta.get(_NAME, "")
        if name in self._keep:
            self.kept[name] = result
        return self._given[name].to(result.dtype) if name in self._given else result


class _Probed(fx.Interpreter):
    """One execution for a probe."""

    def __init__(self, module: fx.GraphModule, probe: Probe, given: Mapping[str, Tensor]) -> None:
        super().__init__(module)
        self._probe, self._given = probe, given
        self._exact: dict[fx.Node, Tensor] = {}
        """What was rounded, by the node that did."""

    def run_node(self, n: fx.Node) -> Any:
        if n.meta.get(_NAME) in self._given:
            return self._given[n.meta[_NAME]]
        result = super().run_node(n)
        if n.target is RULES["QuantizeLinear"]:
            (self._exact[n],) = self.fetch_args_kwargs_from_env(n)[0][:1]
        elif n.target is RULES["DequantizeLinear"] and n.args[0] in self._exact:
            scale = cast(fx.Node, n.args[1])
            return self._probe.round(scale.meta[_NAME], self._exact[cast(fx.Node, n.args[0])], result)
        return result


class _Builder:
    """Makes a graph module of a graph, or of a body in one."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._root, self._graph = nn.Module(), fx.Graph()
        self._values: dict[str, fx.Node] = {}
        self._half_bytes: set[str] = set()
        """Constants of four bits, which torch has no integers of."""

    def build(self, graph: onnx.GraphProto, around: Sequence[str] | None = None) -> fx.GraphModule:
        """A module that takes the graph's inputs and returns its outputs by name.

        That of a body also takes the values `around` it that it reads, and returns its outputs in order.
        """
        weights = {tensor.name for tensor in graph.initializer}
        for tensor in graph.initializer:
            self._values[tensor.name] = self._constant(tensor)
            self._values[tensor.name].meta[_NAME] = tensor.name
        names = [value.name for value in graph.input if value.name not in weights]
        for index, name in enumerate([*names, *(around or ())]):
            self._values[name] = self._graph.placeholder(f"input_{index}")
            self._values[name].meta[_NAME] = name
        for node in graph.node:
            self._add(node)
        outputs = {value.name: self._values[value.name] for value in graph.output}
        self._graph.output(outputs if around is None else [self._values[value.name] for value in graph.output])
        return fx.GraphModule(self._root, self._graph)

    def _add(self, node: onnx.NodeProto) -> None:
        compute = RULES.get(node.op_type)
        if compute is None or node.domain not in ("", "ai.onnx"):
            raise UnsupportedOpError(f"the simulation has no rule for {node.op_type}, as {node.name or node.output[0]}")
        if node.op_type == "QuantizeLinear" and self._half_bytes.intersection(node.input):
            raise UnsupportedOpError(f"the simulation cannot round to 4 bits, as {node.name or node.output[0]}")
        arguments = tuple(self._values[name] if name else None for name in node.input)
        options = {each.name: self._attribute(each) for each in node.attribute}
        for each in node.attribute:
            if each.type == onnx.AttributeProto.GRAPH:
                options["around"] = tuple(self._values[name] for name in _read(each.g) if name in self._values)
        known = keywords(compute)
        if "wide" in known:
            options["wide"] = self._dtype
        if others := sorted(options.keys() - known):
            raise UnsupportedOpError(
                f"the simulation's rule for {node.op_type} has no {', '.join(others)}, as {node.name or node.output[0]}"
            )
        made = self._graph.call_function(compute, arguments, options)
        several = node.op_type in SEVERAL
        for index, name in enumerate(node.output):
            if name:
                value = self._graph.call_function(operator.getitem, (made, index)) if several else made
                value.meta[_NAME] = name
                self._values[name] = value
            if not several:
                break  # what else it could put out is for training

    def _attribute(self, attribute: onnx.AttributeProto) -> Any:
        if attribute.type == onnx.AttributeProto.TENSOR:
            return self._constant(attribute.t)
        if attribute.type == onnx.AttributeProto.GRAPH:
            around = [name for name in _read(attribute.g) if name in self._values]
            return self._attach(_Builder(self._dtype).build(attribute.g, around))
        value = onnx.helper.get_attribute_value(attribute)
        return value.decode() if isinstance(value, bytes) else value

    def _constant(self, tensor: onnx.TensorProto) -> fx.Node:
        if tensor.data_type in _HALF_BYTES:
            self._half_bytes.add(tensor.name)
        return self._attach(_tensor(tensor, self._dtype))

    def _attach(self, content: Tensor | nn.Module) -> fx.Node:
        if isinstance(content, nn.Module):
            name = f"body_{len(self._root._modules)}"
            self._root.add_module(name, content)
        else:
            name = f"constant_{len(self._root._buffers)}"
            self._root.register_buffer(name, content)
        return self._graph.get_attr(name)


def _read(graph: onnx.GraphProto) -> list[str]:
    """Names of values that a body reads and does not make, in order."""
    made = {value.name for value in (*graph.input, *graph.initializer)}
    made |= {name for node in graph.node for name in node.output}
    bodies = (each.g for node in graph.node for each in node.attribute if each.type == onnx.AttributeProto.GRAPH)
    read = [name for node in graph.node for name in node.input] + [name for body in bodies for name in _read(body)]
    read += [value.name for value in graph.output]
    return [name for name in dict.fromkeys(read) if name and name not in made]


def _tensor(tensor: onnx.TensorProto, dtype: torch.dtype) -> Tensor:
    """Floats in `dtype`, but for those of 8 bits; integers of 4 bits in 8."""
    content = onnx.numpy_helper.to_array(tensor)
    if tensor.data_type in FLOAT8:
        return torch.from_numpy(content.view(np.uint8).copy()).view(FLOAT8[tensor.data_type])
    if tensor.data_type in _HALF_BYTES:
        content = content.astype(_HALF_BYTES[tensor.data_type])
    elif tensor.data_type in (*NARROW, *WIDE):
        return torch.from_numpy(content.astype(np.float64)).to(dtype)
    return torch.from_numpy(np.array(content))
