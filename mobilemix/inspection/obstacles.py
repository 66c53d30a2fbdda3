"""What an exporter has no form for, as its own registry of operators tells, without running it.

An exporter decomposes what it does not know before it gives up, so an operator is judged by what is left of it then.
Writing into a tensor is no obstacle to any of them: `run_decompositions`, which all call or ask for, undoes it.
"""

import abc
import functools
import importlib.metadata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any

import onnx
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._export.utils import _is_preservable_cia_op
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.onnx._internal.exporter import _decomp, _dispatching, _registration
from torch.utils import _pytree as pytree

from mobilemix.inspection.costs import calls, operator_name
from mobilemix.inspection.report import Obstacle
from mobilemix.passes.base import source
from mobilemix.targets.coreml import readers
from mobilemix.targets.litert.quiet import load_converter
from mobilemix.targets.onnx.translate import silence
from mobilemix.targets.onnx.translations import TRANSLATIONS
from mobilemix.targets.tensorrt.preflight import LACKS


class Exporter(abc.ABC):
    """What can say why it does not take an operator."""

    name: str

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._known: dict[object, list[tuple[str, str]]] = {}

    def refusals(self, node: fx.Node) -> list[tuple[str, str]]:
        """(Who does not take it, why) for a call of a program; calls of like arguments are judged once."""
        key = _signature(node)
        if key not in self._known:
            self._known[key] = list(dict.fromkeys(self._judge(node)))
        return self._known[key]

    @abc.abstractmethod
    def _judge(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        """The same, without memory."""


Refused = Mapping[tuple[str, str, str], list[fx.Node]]
"""(Operator, who does not take it, why) → the calls of it."""


def find(program: ExportedProgram, exporter: Exporter) -> Refused:
    """What is refused of a program."""
    found: dict[tuple[str, str, str], list[fx.Node]] = defaultdict(list)
    for node in calls(program):
        for stops, reason in exporter.refusals(node):
            found[operator_name(node), stops, reason].append(node)
    return found


def summarise(refused: Refused, handled_by: Callable[[tuple[str, str, str]], str | None]) -> tuple[Obstacle, ...]:
    """As a report gives it."""
    return tuple(
        Obstacle(*key, len(nodes), tuple(dict.fromkeys(map(source, nodes))), handled_by(key))
        for key, nodes in refused.items()
    )


class StockOnnx(Exporter):
    """`torch.onnx.export` as it comes, and ONNX Runtime, which reads its files."""

    name = f"torch.onnx {torch.__version__}"
    reader = "ONNX Runtime"
    own: Iterable[Any] = ()
    """Operators that are translated besides torch's own."""

    def __init__(self) -> None:
        """Read torch's registry."""
        super().__init__()
        self._registry, self._table = _torchlib()
        self._lacks = self._missing()

    @staticmethod
    def _missing() -> frozenset[str]:
        """Standard operators that the reader has not."""
        return onnx_runtime_lacks()

    def _judge(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        if node.target in self.own:
            return
        whole = not _is_composite(node.target) or _is_preservable(node.target)
        registered = self._registry.is_registered(node.target)  # type: ignore[arg-type]
        for part in [node] if whole and registered else decomposed(node, self._table):
            function, _ = _dispatching.dispatch(part, self._registry)
            if function is None:
                yield "torch.onnx", f"no ONNX form of {_phrase(part)}"
                continue
            operators = _mentioned(function)
            # The exporter's optimiser turns sequences of known length, which all are here, into tensors.
            for operator in sorted(name for name in operators & self._lacks if "Sequence" not in name):
                yield self.reader, f"becomes {operator}, which {self.reader} does not have"


class OwnOnnx(StockOnnx):
    """mobilemix's ONNX target: torch's translations and its own."""

    name = "mobilemix"
    own = TRANSLATIONS


class StockTensorRT(StockOnnx):
    """`torch.onnx.export` as it comes, and NVIDIA's parser, which reads its files."""

    reader = "TensorRT"

    @staticmethod
    def _missing() -> frozenset[str]:
        return LACKS


class OwnTensorRT(StockTensorRT):
    """mobilemix's TensorRT targets: the translations of its ONNX target."""

    name = "mobilemix"
    own = TRANSLATIONS


class StockCoreML(Exporter):
    """coremltools as it comes, on a program after `run_decompositions({})`."""

    name = readers.STOCK
    _find = staticmethod(readers.stock_reader)

    def _judge(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        whole = self._reader(node) is not None or _is_preservable(node.target)
        for part in [node] if whole else decomposed(node, {}):
            reader = self._reader(part)
            if reader is None:
                yield "coremltools", f"no converter for {_phrase(part)}"
            elif (counts := readers.positional(reader)) and len(part.args) not in counts:
                numbers = " or ".join(map(str, counts))
                yield "coremltools", f"its converter for {operator_name(part)} wants all of {numbers} arguments given"
            elif _is_complex(part) and not readers.takes_complex(reader):
                yield "coremltools", f"its converter for {operator_name(part)} takes no complex values"

    def _reader(self, node: fx.Node) -> FunctionType | None:
        return self._find(node.target) if isinstance(node.target, torch._ops.OpOverload) else None


class OwnCoreML(StockCoreML):
    """mobilemix's Core ML target: coremltools' converters and its own."""

    name = "mobilemix"
    _find = staticmethod(readers.reader)


class LiteRT(Exporter):
    """litert-torch as it comes; mobilemix's own target has no lowerings besides."""

    def __init__(self) -> None:
        """Read litert-torch's registry."""
        super().__init__()
        load_converter()
        from litert_torch import fx_infra
        from litert_torch.backend.lowerings import registry

        self.name = f"litert-torch {importlib.metadata.version('litert-torch')}"
        self._table, self._lookup = fx_infra.decomp.pre_lower_decomp(), registry.lookup

    def _judge(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        for part in decomposed(node, self._table):
            if self._lookup(part.target) is None:
                yield "litert-torch", f"no lowering of {_phrase(part)}"
            elif _is_complex(part):
                yield "LiteRT", "its operators take no complex values"


EXPORTERS: Mapping[str, tuple[type[Exporter], type[Exporter]]] = {
    "coreml": (StockCoreML, OwnCoreML),
    "litert": (LiteRT, LiteRT),
    "onnx": (StockOnnx, OwnOnnx),
    "tensorrt": (StockTensorRT, OwnTensorRT),
}
"""For each target its stock exporter and ours; what is true of TensorRT is true of TensorRT for RTX."""


def decomposed(node: fx.Node, table: Mapping[Any, Callable[..., Any]]) -> list[fx.Node]:
    """The calls that remain of one after decomposition by `table`; the call itself where torch cannot trace it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return [node]
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda item: item.meta.get("val"))
    leaves, structure = pytree.tree_flatten((args, kwargs))
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]

    def call(*tensors: Tensor) -> Any:
        given = dict(zip(places, tensors, strict=True))
        call_args, call_kwargs = pytree.tree_unflatten(
            [given.get(index, leaf) for index, leaf in enumerate(leaves)], structure
        )
        return node.target(*call_args, **call_kwargs)  # type: ignore[operator]

    try:
        with torch.no_grad(), enable_python_dispatcher():
            body = make_fx(torch.func.functionalize(call, remove="mutations"), decomposition_table=dict(table))(
                *(leaves[index] for index in places)
            )
    except RuntimeError:
        return [node]
    return [
        part
        for part in body.graph.nodes
        if part.op == "call_function" and isinstance(part.target, torch._ops.OpOverload)
    ]


@functools.cache
def _torchlib() -> tuple[_registration.ONNXRegistry, Mapping[Any, Callable[..., Any]]]:
    """torch's ONNX forms of operators, and its decompositions of those that have none."""
    with silence():
        registry = _registration.ONNXRegistry.from_torchlib()
    registered = set(_decomp.get_onnx_implemented_overloads(registry))
    return registry, _decomp.create_onnx_friendly_decomposition_table(registered)


@functools.cache
def onnx_runtime_lacks() -> frozenset[str]:
    """Standard operators for which ONNX Runtime's CPU provider has no kernel, and ONNX no definition by others."""
    kernels = {each.op_name for each in get_all_opkernel_def() if each.provider == "CPUExecutionProvider"}
    schemas = [schema for schema in onnx.defs.get_all_schemas() if schema.domain == "" and not schema.deprecated]
    return frozenset(
        schema.name
        for schema in schemas
        if schema.name not in {*kernels, "Constant"}
        and not schema.has_function
        and not schema.has_context_dependent_function
    )


def _is_composite(op: Any) -> bool:
    """Whether torch itself defines an operator by others."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(op, torch._ops.OpOverload) and op.has_kernel_for_dispatch_key(key)


def _is_preservable(op: Any) -> bool:
    """Whether `run_decompositions` can keep a composite operator: not one that may return a view."""
    return _is_composite(op) and bool(_is_preservable_cia_op(op))


def _mentioned(function: Any) -> set[str]:
    """Names that a function of torchlib and its helpers beside it mention, those of ONNX operators among them."""
    seen: set[CodeType] = set()
    names: set[str] = set()
    queue = [getattr(function, "func", function)]  # onnxscript wraps what it registers
    while queue:
        current = queue.pop()
        if not isinstance(current, FunctionType) or current.__code__ in seen:
            continue
        seen.add(current.__code__)
        mentioned = _names(current.__code__)
        names |= mentioned
        beside = (current.__globals__.get(name) for name in mentioned)
        queue += [helper for helper in beside if getattr(helper, "__module__", None) == current.__module__]
    return names


def _names(code: CodeType) -> set[str]:
    """Attributes and globals that a function's body mentions, inner functions included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _signature(node: fx.Node) -> object:
    """Calls of one operator on tensors of the same dtypes and ranks decompose alike."""
    values = pytree.tree_leaves(fx.map_arg((node.args, node.kwargs), lambda item: item.meta.get("val")))
    return node.target, *((leaf.dtype, leaf.dim()) if isinstance(leaf, Tensor) else type(leaf) for leaf in values)


def _is_complex(node: fx.Node) -> bool:
    values = [node.meta.get("val"), *(x.meta.get("val") for x in node.all_input_nodes)]
    return any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in pytree.tree_leaves(values))


def _phrase(node: fx.Node) -> str:
    """ "view_as_complex", or "mul on complex values"."""
    inputs = pytree.tree_leaves([x.meta.get("val") for x in node.all_input_nodes])
    on_complex = any(isinstance(leaf, Tensor) and leaf.is_complex() for leaf in inputs)
    return operator_name(node) + (" on complex values" if on_complex else "")
