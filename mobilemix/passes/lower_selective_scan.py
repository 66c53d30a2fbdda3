"""Mamba's selective scan in plain operators."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments, node_shape
from mobilemix.passes.chunks import chunk_size
from mobilemix.passes.editing import Edit
from mobilemix.passes.lower_linear_scan import advance, replace_outputs, shifted, steps

aten = torch.ops.aten


class LowerSelectiveScan(Pass):
    """Advance all chunks of time together, with one recurrence over the chunks, and read out at once.

        before:  u, delta (b, d, L), A (d, n), B, C (b, g, n, L) → selective_scan → y (b, d, L), last state (b, d, n)
        after:   Δ = softplus(delta + bias), Δ·u → (S, T, b·g, 1, d/g);   B → (S, T, b·g, n, 1);   A → (b·g, n, d/g)
                 a_t = exp(Δ_t·A), x_t = (Δ·u)_t·B_t     (S, 1, b·g, n, d/g) for each of T steps
                 f = a_t·f + x_t from f = 0               the last state of each chunk if it began at 0
                 exp(ΣΔ·A), f → linear_scan over S → shift → h_0
                 h = a_t·h + x_t from h_0;  y_t = C_t @ h → cat → (b, d, L) → + D·u → · silu(z)

    S chunks of T steps are L, padded with steps of Δ = 0, which leave the state as it is. No tensor holds all states:
    to read out afterwards takes half as long again at L = 3136. From the steps to the readout everything is float32, in
    float16 artifacts too (see `LowerLinearScan`).
    """

    name = "lower_selective_scan"

    def __init__(self, stays: Callable[[fx.Node], bool] = lambda node: False) -> None:  # noqa: ARG005
        """Leave the scans for which `stays` holds to the target."""
        self._stays = stays

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with its selective scans lowered."""
        edit = Edit(program)
        for node in edit.graph.find_nodes(op="call_function", target=torch.ops.mobilemix.selective_scan.default):
            if not self._stays(node):
                with edit.at(node):
                    replace_outputs(edit, node, _Scan(edit, node).emit())
        return edit.finish()


class _Scan:
    """One scan; shapes have the names of the docstring."""

    def __init__(self, edit: Edit, node: fx.Node) -> None:
        self._edit, self._node, self._values = edit, node, arguments(node)
        self._batch, self._channels, self._length = node_shape(self._values["u"])
        # As few as let B and C both be constant within each.
        shapes = [node_shape(self._values[name]) for name in "BC"]
        self._groups = math.lcm(*(shape[1] for shape in shapes if len(shape) == 4))
        self._size = chunk_size(self._length)
        self._count = -(-self._length // self._size)

    def emit(self) -> tuple[fx.Node, fx.Node]:
        """Output and last state."""
        values, emit = self._values, self._edit.emit
        u, delta = values["u"], values["delta"]
        if values["delta_bias"] is not None:
            delta = emit(aten.add.Tensor, delta, emit(aten.unsqueeze.default, values["delta_bias"], -1))
        if values["delta_softplus"]:
            delta = emit(aten.softplus.default, delta)
        y, last_state = self._recurrence(delta, emit(aten.mul.Tensor, delta, u))
        if values["D"] is not None:
            y = emit(aten.add.Tensor, y, emit(aten.mul.Tensor, u, emit(aten.unsqueeze.default, values["D"], -1)))
        if values["z"] is not None:
            y = emit(aten.mul.Tensor, y, emit(aten.silu.default, values["z"]))
        return y, last_state

    def _recurrence(self, delta: fx.Node, moved: fx.Node) -> tuple[fx.Node, fx.Node]:
        emit, rates = self._edit.emit, self._per_channel(self._values["A"])
        delta, moved = self._inputs(delta), self._inputs(moved)
        inputs, outputs = self._matrix("B", column=True), self._matrix("C", column=False)
        with self._edit.at(self._node, wide=True):
            durations = self._steps(delta)
            decays = [emit(aten.exp.default, emit(aten.mul.Tensor, step, rates)) for step in durations]
            values = [
                emit(aten.mul.Tensor, step, matrix)
                for step, matrix in zip(self._steps(moved), self._steps(inputs), strict=True)
            ]
            start = self._between(delta, rates, decays, values) if self._count > 1 else None
            states = advance(self._edit, decays, values, start)
            read = [self._read(state, matrix) for state, matrix in zip(states, self._steps(outputs), strict=True)]
            y = emit(aten.cat.default, read, 1)
            last = emit(aten.slice.Tensor, states[-1], 0, self._count - 1, self._count)
        y = emit(aten.reshape.default, y, [self._count * self._size, self._batch, self._channels])
        if self._count * self._size > self._length:
            y = emit(aten.slice.Tensor, y, 0, 0, self._length)
        last = emit(aten.permute.default, last, [0, 1, 2, 4, 3])
        return (
            emit(aten.permute.default, y, [1, 2, 0]),
            emit(aten.reshape.default, last, [self._batch, self._channels, -1]),
        )

    def _between(self, delta: fx.Node, rates: fx.Node, decays: Sequence[fx.Node], values: Sequence[fx.Node]) -> fx.Node:
        """The state before each chunk."""
        emit = self._edit.emit
        last = advance(self._edit, decays, values, None)[-1]
        total = emit(aten.exp.default, emit(aten.mul.Tensor, emit(aten.sum.dim_IntList, delta, [1], True), rates))
        return shifted(self._edit, emit(torch.ops.mobilemix.linear_scan.default, total, last), None)

    def _read(self, state: fx.Node, matrix: fx.Node) -> fx.Node:
        emit, (*_, rows, columns) = self._edit.emit, node_shape(matrix)
        if rows == 1 < columns:
            return emit(aten.matmul.default, matrix, state)
        product = emit(aten.mul.Tensor, matrix, state)  # C is constant, or there is one state
        return product if node_shape(product)[-2] == 1 else emit(aten.sum.dim_IntList, product, [-2], True)

    def _steps(self, node: fx.Node) -> list[fx.Node]:
        """What each step takes of a tensor over time; all of a constant."""
        return steps(self._edit, node, 1) if node.meta["val"].dim() == 5 else [node] * self._size

    def _inputs(self, node: fx.Node) -> fx.Node:
        """(b, d, L) as (S, T, b·g, 1, d/g)."""
        blocks, channels = self._batch * self._groups, self._channels // self._groups
        shape = [self._count, self._size, blocks, 1, channels]
        return self._edit.emit(aten.reshape.default, self._over_time(node), shape)

    def _matrix(self, name: str, column: bool) -> fx.Node:
        """B or C as (S, T, b·g, n, 1), or (S, T, b·g, 1, n); a constant one, (d, n), as A."""
        emit, node = self._edit.emit, self._values[name]
        if node.meta["val"].dim() == 2:
            return self._per_channel(node)
        groups = node_shape(node)[1] if node.meta["val"].dim() == 4 else 1
        states = node_shape(node)[-2]
        node = self._over_time(node)
        if groups < self._groups:
            steps = self._count * self._size
            node = emit(aten.reshape.default, node, [steps, self._batch, groups, 1, states])
            node = emit(aten.expand.default, node, [-1, -1, -1, self._groups // groups, -1])
        sizes = [states, 1] if column else [1, states]
        return emit(aten.reshape.default, node, [self._count, self._size, self._batch * self._groups, *sizes])

    def _over_time(self, node: fx.Node) -> fx.Node:
        """(…, L) as (S·T, …)."""
        padding = self._count * self._size - self._length
        if padding:
            node = self._edit.emit(aten.constant_pad_nd.default, node, [0, padding])
        last = node.meta["val"].dim() - 1
        return self._edit.emit(aten.permute.default, node, [last, *range(last)])

    def _per_channel(self, node: fx.Node) -> fx.Node:
        """(d, n) as (b·g, n, d/g), or (1, n, d) where that is broadcast."""
        emit, states = self._edit.emit, node_shape(node)[1]
        channels = self._channels // self._groups
        node = emit(aten.reshape.default, node, [self._groups, channels, states])
        node = emit(aten.permute.default, node, [0, 2, 1])
        if 1 in (self._batch, self._groups):
            return node
        node = emit(aten.expand.default, node, [self._batch, -1, -1, -1])
        return emit(aten.reshape.default, node, [-1, states, channels])
