"""What a parser says of ONNX nodes, in terms of the user's source."""

from collections.abc import Sequence
from pathlib import Path

import onnx
from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mobilemix.errors import UnsupportedOpError
from mobilemix.passes.base import source
from mobilemix.targets.onnx.runtime import read_model
from mobilemix.targets.tensorrt.builder import Refusal

REMOVED_BY = {
    "DFT": "complex_to_real",
    "STFT": "complex_to_real",
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), "fold_constants"),
    **dict.fromkeys(("Scan", "Loop"), "reroll_loops with lower_linear_scan"),
    "Einsum": "lower_einsum",
    **dict.fromkeys(("ScatterND", "ScatterElements"), "lower_scatter"),
}
"""Operator → the pass of `mobilemix.passes` that writes such a node with others, where there is one."""

_SHOWN = 2
"""How many places of one error."""


def unsupported(refusals: Sequence[Refusal], path: Path, program: ExportedProgram, name: str) -> UnsupportedOpError:
    """One line for all refusals: the first operator with its reason, its place in the source, and what to do.

    Args:
        refusals: at least one.
        path: the ONNX file whose nodes they name.
        program: what the file was made from.
        name: of who refuses.
    """
    first = refusals[0]
    alike = [each for each in refusals if (each.operator, each.reason) == (first.operator, first.reason)]
    if not first.node and not first.operator:
        return UnsupportedOpError(f"{name} does not take the file: {first.reason}")
    graph = read_model(path).graph
    found = [_place(each.node, graph, program.graph) for each in alike]
    places = list(dict.fromkeys(place for place in found if place))
    where = f" at {'; '.join(places[:_SHOWN])}" if places else f", node {first.node}"
    where += f" and {len(places) - _SHOWN} more places" if len(places) > _SHOWN else ""
    others = sorted({each.operator for each in refusals} - {first.operator})
    besides = f"; nor {', '.join(others)}" if others else ""
    remedy = REMOVED_BY.get(first.operator)
    advice = f"the pass {remedy} removes such nodes" if remedy else "no pass removes it, write it with other operators"
    return UnsupportedOpError(f"{name} does not take {first.operator}{where}: {first.reason}{besides}; {advice}")


def _place(node: str, graph: onnx.GraphProto, program: fx.Graph) -> str | None:
    """The user's line and module of an ONNX node, which is called `module.path/value`; None if nothing leads there."""
    module, _, _ = node.rpartition("/")
    origin = _origin(node, graph, program)
    if origin is None:
        return f"module {module}" if module else None
    return source(origin) + (f" in {module}" if module else "")


def _origin(node: str, graph: onnx.GraphProto, program: fx.Graph) -> fx.Node | None:
    """The program's node whose value an ONNX node computes, or helps to: the first that there is among its readers."""
    known = {each.name: each for each in program.nodes if each.op == "call_function"}
    computed = pytree.tree_leaves(program.output_node().args[0])
    outputs = dict(zip((value.name for value in graph.output), computed, strict=True))
    reached = {name for each in graph.node if each.name == node for name in each.output}
    for each in graph.node:  # in the order of execution
        if not reached.intersection((*each.input, *each.output)):
            continue
        for name in each.output:
            # The forms of a value, and what it was decomposed into, come after a dot.
            if (found := known.get(name.split(".")[0]) or outputs.get(name)) is not None:
                return found if isinstance(found, fx.Node) else None
        reached.update(each.output)
    return None
