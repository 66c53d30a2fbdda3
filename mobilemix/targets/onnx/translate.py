"""ExportedProgram → onnx_ir model, through `torch.onnx.export`, with the program's own value names kept."""

import contextlib
import copy
import dataclasses
import logging
import operator
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes.common import NameFixPass, OutputFixPass
from onnxscript._framework_apis import torch_2_11
from onnxscript.function_libs.torch_lib import ops  # noqa: F401, registers torchlib
from onnxscript.function_libs.torch_lib.registration import default_registry
from torch import fx
from torch.export import ExportedProgram
from torch.onnx._internal.exporter import _fx_passes
from torch.utils import _pytree as pytree

from mobilemix.errors import MobilemixError, TargetError, UnsupportedOpError
from mobilemix.passes.base import source
from mobilemix.targets.base import Lowered
from mobilemix.targets.onnx.translations import TRANSLATIONS, finish

_NOISY_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@dataclasses.dataclass(frozen=True)
class Translation:
    """An ONNX graph of a program, nothing optimised.

    Attributes:
        model: inputs and outputs have the lowered model's names, and values those of the program's nodes, as far as
            their operators have an ONNX form of their own.
        modules: value name → path of the module that computes it, where one is known.
    """

    model: ir.Model
    modules: Mapping[str, str]


def translate(lowered: Lowered, opset: int) -> Translation:
    """Translate a lowered program.

    Raises:
        UnsupportedOpError: an operator that has neither an ONNX form nor a decomposition.
        TargetError: `torch.onnx` failed in another way, or could not convert to the opset.
    """
    with silence():
        exportable = _Exportable.of(lowered.program)
    try:
        with silence(), _only_needed(exportable.graph):
            exported = torch.onnx.export(
                exportable,
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=opset,
                custom_translation_table=dict(TRANSLATIONS),
            )
    except Exception as error:
        raise _explain(error, exportable.translated) from error
    assert exported is not None
    model = exported.model
    reached = model.opset_imports[""]
    if reached != opset:
        raise TargetError(f"torch.onnx could not convert the graph to opset {opset}; it stays at {reached}: use that")
    finish(model)
    names = _source_names(lowered.program.graph, exportable.translated) if exportable.was_decomposed else {}
    for node in model.graph:
        for output in node.outputs:
            output.name = names.get(str(output.name), output.name)
    modules = _modules(lowered.program.graph)
    OutputFixPass()(model)  # gives every output a value of its own, that is no input and no constant
    for value, name in zip(model.graph.outputs, lowered.output_names, strict=True):
        modules[name] = modules.get(str(value.name), "")
        value.name = name
    for value, name in zip(model.graph.inputs, lowered.input_names, strict=True):
        value.name = name
    NameFixPass()(model)  # renames what has the same name as an input or output
    return Translation(model, modules)


@contextlib.contextmanager
def _only_needed(graph: fx.Graph) -> Iterator[None]:
    """Let `torch.onnx` prepare what it needs for a graph rather than for every program, a third of its time.

    It parses the source of all of torchlib's functions, makes a signature anew each time that an ONNX operator is used,
    and evaluates the whole graph again to see where dtypes have to be promoted, which is nowhere if every operator
    returns the dtype that it takes.
    """
    made: dict[tuple[str, str, int], ir.schemas.OpSignature] = {}
    make = ir.schemas.OpSignature.from_op_schema

    def signature(schema: onnx.defs.OpSchema) -> ir.schemas.OpSignature:
        key = schema.domain, schema.name, schema.since_version
        if key not in made:
            made[key] = make(schema)
        return made[key]

    with contextlib.ExitStack() as replaced:
        for owner, name, other in (
            (torch_2_11, "get_torchlib_ops", lambda: list(_torchlib(graph))),
            (ir.schemas.OpSignature, "from_op_schema", signature),
        ):
            replaced.enter_context(mock.patch.object(owner, name, other))
        if all(map(_keeps_dtype, graph.nodes)):
            replaced.enter_context(mock.patch.object(_fx_passes, "insert_type_promotion_nodes"))
        yield


def _torchlib(graph: fx.Graph) -> Iterator[SimpleNamespace]:
    """torchlib's functions for the operators of a graph; all of them if some have none, and are to be decomposed."""
    functions = dict(default_registry.items())
    targets = {node.target for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
    names: set[str] = {target.name() for target in targets - set(TRANSLATIONS)}  # type: ignore[no-untyped-call]
    names.add("aten::scalar_tensor")  # what type promotion makes of a number beside a tensor of another dtype
    whole = {**torch.export.default_decompositions(), **TRANSLATIONS}
    if not names <= set(functions) or any(_must_decompose(target, whole) for target in targets):
        names = {name for name in functions if not name.startswith("internal::")}
    for name, overloaded in functions.items():
        if name in names or name.startswith("prims::"):
            for function in overloaded.overloads:
                yield SimpleNamespace(qualified_name=name, function=function, is_complex=False)
            for function in overloaded.complex:
                yield SimpleNamespace(qualified_name=name, function=function, is_complex=True)


def _keeps_dtype(node: fx.Node) -> bool:
    values = [each.meta.get("val") for each in (node, *node.all_input_nodes)] if node.op == "call_function" else []
    return len({leaf.dtype for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)}) <= 1


class _Exportable(ExportedProgram):
    """A program that decomposes only what ONNX lacks.

    `torch.onnx.export` retraces every program to decompose it, which takes half of its time and names all nodes anew.
    It hands over the table of what ONNX has no operator for, so a program that has none of those, which is the rule
    after our passes, can stay as it is.
    """

    translated: fx.Graph
    """The graph that was translated; its nodes know where in the user's source they come from."""
    was_decomposed: bool

    @classmethod
    def of(cls, program: ExportedProgram) -> "_Exportable":
        """A shallow copy with a graph of its own, because the exporter edits the graph in place."""
        exportable = cls.__new__(cls)
        exportable.__dict__.update(program.__dict__)
        exportable._graph_module = copy.deepcopy(program.graph_module)
        for ours, theirs in zip(exportable.graph.nodes, program.graph.nodes, strict=True):
            ours.name = theirs.name  # a copy avoids Python's own names, such as `input`, which the signature keeps
        exportable.translated, exportable.was_decomposed = exportable.graph, False
        return exportable

    def run_decompositions(
        self, decomp_table: Mapping[Any, Any] | None = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        """Itself where ONNX has every operator, else decomposed; nodes then remember theirs in `from_node`."""
        table = dict(decomp_table or {})
        whole = {**torch.export.default_decompositions(), **TRANSLATIONS}
        targets = {node.target for node in self.graph.nodes if isinstance(node.target, torch._ops.OpOverload)}
        if not any(target in table or _must_decompose(target, whole) for target in targets):
            return self
        decomposed: ExportedProgram = super().run_decompositions(table, decompose_custom_triton_ops)
        self.translated, self.was_decomposed = decomposed.graph, True
        return decomposed


def _must_decompose(target: torch._ops.OpOverload, whole: Collection[Any]) -> bool:
    """Whether an operator writes into a tensor, or is a composite that torch cannot keep `whole`."""
    composite = target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return target._schema.is_mutable or (composite and target not in whole)


def _source_names(program: fx.Graph, translated: fx.Graph) -> dict[str, str]:
    """Names of the translated graph's nodes → those of the program's nodes that they were made from.

    Of all nodes made from one source, the last that others read computes its value and takes its name; what comes
    before is put under that name.
    """
    parts = {(str(node.args[0]), node.args[1]): node.name for node in program.nodes if node.target is operator.getitem}
    known = {node.name for node in program.nodes}
    origin = {
        node: steps[0].name
        for node in translated.nodes
        # The exporter's own insertions come from nodes of the translated graph instead.
        if (steps := node.meta.get("from_node")) and steps[0].name in known and node.op == "call_function"
    }
    names: dict[str, str] = {}
    values: dict[str, fx.Node] = {}
    for node, source_name in origin.items():
        names[node.name] = f"{source_name}.{node.name}"
        if (part := (source_name, node.args[1:] and node.args[1])) in parts and node.target is operator.getitem:
            names[node.name] = parts[part]
        elif any(origin.get(user) != source_name for user in node.users):
            values[source_name] = node
    return names | {node.name: source_name for source_name, node in values.items()}


def _modules(graph: fx.Graph) -> dict[str, str]:
    """Node names → path of the module of the user's that computes them, "" for the outermost."""
    paths = {}
    for node in graph.nodes:
        stack = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
        paths[node.name] = stack[-1] if stack else ""
    return paths


def _explain(error: Exception, graph: fx.Graph) -> MobilemixError:
    """One line of what `torch.onnx` says in fifty: the operator, why, and where it is in the user's source."""
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)  # type: ignore[arg-type]
    reason = str(causes[-1]).strip().splitlines()[0] if str(causes[-1]).strip() else type(causes[-1]).__name__
    for cause in reversed(causes):
        if found := re.match(r"Error when translating node %(\w+)", str(cause)):
            node = next(node for node in graph.nodes if node.name == found[1])
            if reason.startswith("No ONNX function found"):
                return UnsupportedOpError(f"ONNX has no operator for {node.target} at {source(node)}")
            return TargetError(f"torch.onnx cannot translate {node.target} at {source(node)}: {reason}")
    return TargetError(f"torch.onnx cannot export the program: {reason}")


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keep the exporter's warnings from the user: they are about packages and arguments that are not theirs."""
    loggers = [logging.getLogger(name) for name in _NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
