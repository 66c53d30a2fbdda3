"""Linear recurrences in plain operators."""

import itertools
import math
import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments, node_shape
from mobilemix.passes.chunks import UNROLLED, chunk_size
from mobilemix.passes.editing import Edit
from mobilemix.passes.elementwise import BINARY, UNARY, is_elementwise

aten = torch.ops.aten

_SATURATING = frozenset({"exp", "sigmoid"})
"""What decays come from; the argument may be rounded."""

_MOST_AXES = 3
"""Besides those of chunks and steps: Core ML takes five."""


class LowerLinearScan(Pass):
    """Advance all chunks of a recurrence together, find the states between them, and run again from these.

        before:  a, b (L, *rest) → linear_scan → h (L, *rest)
        after:   a, b → (S, T, X);  a_t, b_t (S, 1, X) for each of T steps
                 f = a_t·f + b_t from f = 0      the last state of each chunk if it began at 0
                 Π a_t, f (S, 1, X) → linear_scan, in the same way if S is large → shift → h_0 (S, 1, X)
                 h = a_t·h + b_t from h_0 → cat → h (S, T, X) → (L, *rest)

    Up to 16 steps are one chunk. No quotient or difference of large numbers occurs, so that nothing can overflow that
    the recurrence itself does not: forms with a cumulative sum and its exponential are NaN already for usual decays.
    Everything is computed in float32, in float16 artifacts too: a decay of 0.9999 has no float16 form but 1. So is what
    leads from an exponential or a sigmoid to the decays, of recurrences that stay, too.
    """

    name = "lower_linear_scan"

    def __init__(self, stays: Callable[[fx.Node], bool] = lambda node: False) -> None:  # noqa: ARG005
        """Leave the scans for which `stays` holds to the target."""
        self._stays = stays

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program without recurrences."""
        edit = Edit(program)
        for node in edit.graph.find_nodes(op="call_function", target=torch.ops.mobilemix.linear_scan.default):
            values = arguments(node)
            a, b, initial = values["a"], values["b"], values["initial"]
            _widen(edit, a)
            if self._stays(node):
                continue
            with edit.at(node, wide=True):
                b = _expanded(edit, b, node_shape(node))
                edit.replace(node, _scan(edit, a, b, initial))
        return edit.finish()


def _widen(edit: Edit, node: fx.Node) -> None:
    if is_elementwise(node, UNARY | BINARY | {"rsub"}) or node.target is operator.getitem or _is_view(node):
        edit.widen(node)
        if not is_elementwise(node, _SATURATING):
            for source in node.all_input_nodes:
                _widen(edit, source)


def _is_view(node: fx.Node) -> bool:
    """Whether a node takes and orders elements of a tensor."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload) or op.namespace != "aten":
        return False
    return op._opname == "reshape" or any(argument.alias_info is not None for argument in op._schema.arguments)


def _scan(edit: Edit, a: fx.Node, b: fx.Node, initial: fx.Node | None) -> fx.Node:
    """All states; b has their shape, a may be broadcast."""
    length, *rest = node_shape(b)
    if length <= UNROLLED:
        return edit.emit(aten.cat.default, advance(edit, steps(edit, a, 0), steps(edit, b, 0), initial), 0)
    size = chunk_size(length)
    count = -(-length // size)
    a, b = (_pad(edit, x, count * size - length) for x in (a, b))
    widths = _merged(node_shape(a)[1:], rest)
    if len(widths[0]) > _MOST_AXES:
        a, widths = _expanded(edit, a, node_shape(b)), ([math.prod(rest)],) * 2
    a, b = (edit.emit(aten.reshape.default, x, [count, size, *width]) for x, width in zip((a, b), widths, strict=True))
    decays, values = steps(edit, a, 1), steps(edit, b, 1)
    last = advance(edit, decays, values, None)[-1]
    total = edit.emit(aten.prod.dim_int, a, 1, True)
    if initial is not None:
        initial = edit.emit(aten.reshape.default, _expanded(edit, initial, rest), [1, *widths[1]])
    start = shifted(edit, _scan(edit, total, last, initial), initial)
    whole = edit.emit(aten.cat.default, advance(edit, decays, values, start), 1)
    whole = edit.emit(aten.reshape.default, whole, [count * size, *rest])
    return whole if count * size == length else edit.emit(aten.slice.Tensor, whole, 0, 0, length)


def steps(edit: Edit, node: fx.Node, axis: int) -> list[fx.Node]:
    """The tensor at each index along an axis, which stays."""
    return edit.items(edit.emit(aten.split.Tensor, node, 1, axis))


def advance(edit: Edit, decays: Sequence[fx.Node], values: Sequence[fx.Node], state: fx.Node | None) -> list[fx.Node]:
    """Every state of state ← decay · state + value; None is a state of 0."""
    states = []
    for decay, value in zip(decays, values, strict=True):
        state = value if state is None else edit.emit(aten.add.Tensor, edit.emit(aten.mul.Tensor, decay, state), value)
        states.append(state)
    return states


def shifted(edit: Edit, states: fx.Node, initial: fx.Node | None) -> fx.Node:
    """The state before each step, from the state after each, (S, *rest)."""
    count, *rest = node_shape(states)
    if initial is None:
        first = edit.add_constant("scan_start", torch.zeros(1, *rest, dtype=states.meta["val"].dtype))
    else:
        first = edit.emit(aten.reshape.default, initial, [1, *rest])
    return edit.emit(aten.cat.default, [first, edit.emit(aten.slice.Tensor, states, 0, 0, count - 1)], 0)


def replace_outputs(edit: Edit, node: fx.Node, outputs: Sequence[fx.Node]) -> None:
    """Let those who take one of a scan's outputs take another value, in the same dtype."""
    for user in list(node.users):
        index, dtype = user.args[1], user.meta["val"].dtype
        assert isinstance(index, int)
        output = outputs[index]
        edit.replace(user, output if output.meta["val"].dtype == dtype else edit.emit(aten.to.dtype, output, dtype))


def _pad(edit: Edit, node: fx.Node, amount: int) -> fx.Node:
    """With zeros behind the last step."""
    if not amount:
        return node
    return edit.emit(aten.constant_pad_nd.default, node, [*[0, 0] * (node.meta["val"].dim() - 1), 0, amount])


def _expanded(edit: Edit, node: fx.Node, shape: Sequence[int]) -> fx.Node:
    return node if node_shape(node) == tuple(shape) else edit.emit(aten.expand.default, node, list(shape))


def _merged(a: Sequence[int], b: Sequence[int]) -> tuple[list[int], list[int]]:
    """Both shapes, with neighbouring axes as one if a has both of b's sizes or is broadcast along both."""
    kinds = itertools.groupby(
        (pair for pair in zip(a, b, strict=True) if pair != (1, 1)), lambda pair: pair[0] == pair[1]
    )
    runs = [list(zip(*pairs, strict=True)) for _, pairs in kinds]
    return [math.prod(run[0]) for run in runs], [math.prod(run[1]) for run in runs]
