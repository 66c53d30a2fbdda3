"""Complex tensors and Fourier transforms rewritten as real arithmetic."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import decomposition_table
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from mobilemix.errors import UnsupportedOpError
from mobilemix.passes.base import Pass, PassResult, source
from mobilemix.passes.complex_to_real import fft, rules, stft  # noqa: F401 (they fill the table)
from mobilemix.passes.complex_to_real.table import RULES, Call
from mobilemix.passes.complex_to_real.values import Complex, Real, nodes
from mobilemix.passes.editing import Edit

aten = torch.ops.aten

_FOURIER = ("aten::fft_", "aten::_fft_", "aten::stft", "aten::istft")
_VIEWS = """
    alias diagonal expand narrow permute select slice split split_with_sizes squeeze t transpose unbind unfold unsqueeze
"""
_EQUIVALENT: dict[Any, Any] = {
    # Of a tensor whose strides are not those of the complex one.
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.view_copy.default), aten.reshape.default),
    **{
        getattr(getattr(aten, f"{name}_copy"), overload): getattr(getattr(aten, name), overload)
        for name in _VIEWS.split()
        for overload in getattr(aten, f"{name}_copy").overloads()
        if "out" not in overload
    },
    torch.ops.prims.convert_element_type.default: aten.to.dtype,
}
"""Operators under the name by which the rules know them."""


class ComplexToReal(Pass):
    """Every complex tensor becomes a pair of real ones, and every Fourier transform a product with a real matrix.

        before:  x (B, C, H, W) → fft_rfft2 → complex (B, C, H, K) → mul k (C, H, K) → fft_irfft2 → y (B, C, H, W)
        after:   x → matmul (W, 2K) → matmul (2H, 2H) → re, im (B, C, H, K) each
                   → re·k_re − im·k_im, re·k_im + im·k_re → matmul (2H, 2H) → matmul (2K, W) → y,   K = W // 2 + 1

    An operator without a rule that is composed of others is rewritten by those. Real operators, composite ones
    included, stay as they are. Complex parameters and buffers become two, `name_re` and `name_im`. Complex inputs and
    outputs of the model become what `torch.view_as_real` makes of them: a last axis of two, [re, im].

    Raises (from `rewrite`):
        UnsupportedOpError: an operator on complex tensors that has no rule.
    """

    name = "complex_to_real"

    def keeps(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[tuple[int, ...], torch.dtype]:
        """Complex inputs and outputs become real, with their parts along a last axis."""
        return ((*shape, 2), dtype.to_real()) if dtype.is_complex else (shape, dtype)

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without complex tensors and Fourier transforms."""
        edit = Edit(program)
        walk = _Walk(edit)
        for node in list(edit.graph.nodes):
            if node.op == "placeholder":
                walk.enter(node)
            elif node.op == "call_function" and walk.concerns(node):
                with edit.at(node):
                    walk.call(node)
            elif node.op == "output":
                walk.leave(node)
        return edit.finish()


class _Walk:
    """The walk over one graph: which real tensors stand for which complex node."""

    def __init__(self, edit: Edit) -> None:
        self._edit = edit
        self._rewritten: dict[fx.Node, Any] = {}

    def enter(self, node: fx.Node) -> None:
        if not _is_complex(node.meta["val"]):
            return
        tensor, name = self._edit.constant(node), self._edit.name(node)
        if tensor is None:
            shape = tuple(node.meta["val"].shape)
            pairs = Real(self._edit, self._edit.view_as_real(node))
            self._rewritten[node] = Complex.from_stacked(pairs, shape, len(shape))
            return
        parts = ((f"{name}_re", tensor.real), (f"{name}_im", tensor.imag))
        self._rewritten[node] = Complex(*(Real(self._edit, self._edit.add_constant(*part)) for part in parts))

    def concerns(self, node: fx.Node) -> bool:
        """Whether a call takes or returns something complex, or belongs to torch.fft."""
        takes_complex = any(value in self._rewritten for value in node.all_input_nodes)
        return takes_complex or _is_complex(node.meta.get("val")) or _is_fourier(node.target)

    def call(self, node: fx.Node) -> None:
        args, kwargs = fx.map_arg(
            (node.args, node.kwargs), lambda item: self._rewritten.get(item, Real(self._edit, item))
        )
        real_only = all(user.target is aten.real.default for user in node.users)
        result = self._run(node, node.target, args, kwargs, node.meta["val"], real_only)
        if isinstance(result, Real) and result.node in self._rewritten:
            result = result.call(aten.alias.default)  # the node of a complex input stands for complex numbers
        self._rewritten[node] = result
        if isinstance(result, Real):
            self._edit.replace(node, result.node)

    def leave(self, node: fx.Node) -> None:
        for value in node.all_input_nodes:
            result = self._rewritten.get(value)
            if isinstance(result, Complex):
                with self._edit.at(node, origin=value):
                    node.replace_input_with(value, rules.pairs(result).node)
                self._edit.changed = True

    def _run(self, node: fx.Node, op: Any, args: Any, kwargs: Any, value: Any, real_only: bool = False) -> Any:
        """What stands for op(*args, **kwargs), a call in the course of `node` that originally returned `value`."""
        if op is operator.getitem:
            return args[0][args[1]]
        op = _EQUIVALENT.get(op, op)
        rule = RULES.get(op._schema.name)
        takes_complex = any(isinstance(item, Complex) for item in _leaves((args, kwargs)))
        if not takes_complex and not _is_complex(value) and not _is_fourier(op):
            result = self._edit.emit(op, *nodes(args), **nodes(kwargs))
            items = [result] if isinstance(value, Tensor) else self._edit.items(result)
            reals = [Real(self._edit, item) for item in items]
            return reals[0] if isinstance(value, Tensor) else reals
        result = NotImplemented if rule is None else rule(Call(self._edit, op, value, real_only), *args, **kwargs)
        return self._decompose(node, op, args, kwargs) if result is NotImplemented else result

    def _decompose(self, node: fx.Node, op: Any, args: Any, kwargs: Any) -> Any:
        """Run the operators that `op` is composed of."""
        leaves, spec = pytree.tree_flatten((args, kwargs), is_leaf=_is_number)
        numbers = {index: leaf for index, leaf in enumerate(leaves) if _is_number(leaf)}

        def call(*tensors: Tensor) -> Any:
            given = dict(zip(numbers, tensors, strict=True))
            call_args, call_kwargs = pytree.tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(leaves)], spec)
            return op(*call_args, **call_kwargs)

        tensors = [self._edit.empty(number.shape, number.full_dtype) for number in numbers.values()]
        body = _trace(call, op, tensors)
        if body is None:
            through = "" if op is node.target else f", a part of {node.target},"
            raise UnsupportedOpError(
                f"{op}{through} on complex tensors at {source(node)} has no rule;"
                " compute what it does from the real and the imaginary part"
            )
        steps = [step for step in body.graph.nodes if step.op == "call_function"]
        values = dict(zip(body.graph.find_nodes(op="placeholder"), numbers.values(), strict=True))
        for constant in body.graph.find_nodes(op="get_attr"):
            tensor = getattr(body, constant.target)
            values[constant] = Real(self._edit, self._edit.add_constant(f"{node.name}_{constant.target}", tensor))
        for step in steps:
            step_args, step_kwargs = fx.map_arg((step.args, step.kwargs), values.__getitem__)
            values[step] = self._run(node, step.target, step_args, step_kwargs, step.meta["val"])
        (result,) = body.graph.find_nodes(op="output")
        return fx.map_arg(result.args[0], values.__getitem__)


def _trace(call: Callable[..., Any], op: Any, tensors: list[Tensor]) -> fx.GraphModule | None:
    """The operators that `op` is composed of, or that torch knows as its decomposition; None if there are none."""
    for table in ({}, {op: decomposition_table[op]} if op in decomposition_table else None):
        if table is None:
            continue
        try:
            body: fx.GraphModule = make_fx(torch.func.functionalize(call, remove="mutations"), table)(*tensors)
        except Exception:  # noqa: S112 -- torch raises anything where the composition depends on values
            continue
        targets = [step.target for step in body.graph.nodes if step.op == "call_function"]
        if op not in targets and all(target in _EQUIVALENT or _is_aten(target) for target in targets):
            return body
    return None


def _is_aten(op: Any) -> bool:
    return op is operator.getitem or (isinstance(op, torch._ops.OpOverload) and op.namespace == "aten")


def _is_complex(value: Any) -> bool:
    return any(isinstance(item, Tensor) and item.is_complex() for item in pytree.tree_leaves(value))


def _is_fourier(op: Any) -> bool:
    return isinstance(op, torch._ops.OpOverload) and op._schema.name.startswith(_FOURIER)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real | Complex)


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value, is_leaf=_is_number)
