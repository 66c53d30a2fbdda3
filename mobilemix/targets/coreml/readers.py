"""Which functions read PyTorch's operators into Core ML's, coremltools' own and mobilemix's."""

import ast
import functools
import inspect
import textwrap
from types import FunctionType

import coremltools as ct
import torch
from coremltools.converters.mil.frontend.torch import ops as stock_readers
from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY
from coremltools.converters.mil.frontend.torch.utils import sanitize_op_kind

from mobilemix.targets.coreml import frontend  # noqa: F401, registers mobilemix's

STOCK = f"coremltools {ct.__version__}"


def reader(op: torch._ops.OpOverload) -> FunctionType | None:
    """The function for an operator; None if there is none."""
    name: str = op.name()  # type: ignore[no-untyped-call]
    found: FunctionType | None = _TORCH_OPS_REGISTRY.get_func(sanitize_op_kind(name))
    return found


def stock_reader(op: torch._ops.OpOverload) -> FunctionType | None:
    """coremltools' function for an operator, where mobilemix put another in its place too."""
    found = reader(op)
    if found is None or not found.__module__.startswith("mobilemix."):
        return found
    return getattr(stock_readers, found.__name__, None)


def takes_complex(function: FunctionType) -> bool:
    """Whether a reader does anything about complex values."""
    return any("complex" in name for name in function.__code__.co_names)


@functools.cache
def positional(function: FunctionType) -> tuple[int, ...]:
    """How many positional arguments a reader takes, where its code says so; else empty."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for call in ast.walk(tree):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "_get_inputs":
            for keyword in call.keywords:
                if keyword.arg == "expected":
                    try:
                        counts = ast.literal_eval(keyword.value)
                    except ValueError:
                        return ()
                    return (counts,) if isinstance(counts, int) else tuple(counts)
    return ()
