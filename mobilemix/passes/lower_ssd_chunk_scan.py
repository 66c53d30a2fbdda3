"""Mamba-2's scan in matrix products."""

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from mobilemix.passes.base import Pass, PassResult, arguments, node_shape
from mobilemix.passes.chunks import nearest
from mobilemix.passes.editing import Edit
from mobilemix.passes.lower_linear_scan import replace_outputs

aten = torch.ops.aten

_WHOLE = 64
"""Scans of up to so many steps are one chunk."""

_SIZES = range(28, _WHOLE + 1)
"""Steps per chunk of longer ones. √(p·n) is best: a chunk then has as many decays as a state has elements."""

_FORGOTTEN = -64.0
"""Logarithm of a decay over a chunk below which nothing is left of a state; sums of it stay within float16."""


class LowerSsdChunkScan(Pass):
    """The dual form of SSD: products with a matrix of decays within chunks, and once more from chunk to chunk.

        before:  x (b, L, h, p), dt (b, L, h), A (h), B, C (b, L, g, n) → ssd_chunk_scan → y, final states (b, h, p, n)
        after:   Δ = clamp(softplus(dt + bias));   S chunks of T steps are L, padded with steps of Δ = 0
                 E (b·S, h, 1 + T, T) = exp((Δ·A)[r > j] @ [r ≤ i])      decay from step j to i; row 0 from the start
                 y (p, T) = (Δ·x)ᵀ @ (E · (B @ Cᵀ) · [j ≤ i])            of every chunk and head
                 F (p, n) = ((Δ·x)ᵀ · E[:, T − 1]) @ B                   what a chunk adds to the state
                 H = exp((ΣΔ·A)[r > s'] @ [r < s]) · [s' < s] @ F        the state before each chunk
                 y + (H @ Cᵀ) · E[0] → (b, L, h, p) → + D·x → · silu(z)

    Sums of logarithms are taken as such, by a product with ones, and not as differences of a cumulative sum, which lose
    a sixth of their value in float16. So all of it keeps to 7e-4 in pure float16. Up to 64 steps are one chunk.
    """

    name = "lower_ssd_chunk_scan"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with its SSD scans lowered."""
        edit = Edit(program)
        for node in edit.graph.find_nodes(op="call_function", target=torch.ops.mobilemix.ssd_chunk_scan.default):
            with edit.at(node):
                replace_outputs(edit, node, _Scan(edit, node).emit())
        return edit.finish()


class _Scan:
    """One scan; shapes have the names of the docstring, and heads are (g, h/g) or, where all share B and C, (h)."""

    def __init__(self, edit: Edit, node: fx.Node) -> None:
        self._edit, self._values = edit, arguments(node)
        self._batch, self._length, heads, self._width = node_shape(self._values["x"])
        groups, self._state = node_shape(self._values["B"])[2:]
        self._heads = [heads] if groups == 1 else [groups, heads // groups]
        self._shared = [1] if groups == 1 else [groups, 1]
        self._size = (
            self._length
            if self._length <= _WHOLE
            else nearest(self._length, _SIZES, (self._width * self._state) ** 0.5)
        )
        self._count = -(-self._length // self._size)
        self._returns_states = any(user.args[1] == 1 for user in node.users)

    def emit(self) -> tuple[fx.Node, fx.Node]:
        """Output and final states; the states stand for themselves where nobody takes them."""
        emit, values, size = self._edit.emit, self._values, self._size
        step = self._step()
        moved = emit(aten.mul.Tensor, values["x"], emit(aten.unsqueeze.default, step, -1))
        moved = self._columns(moved, self._heads, self._width)
        inputs, outputs = self._rows(values["B"], self._state), self._columns(values["C"], self._shared, self._state)
        logarithms = emit(aten.unsqueeze.default, emit(aten.mul.Tensor, step, values["A"]), -1)
        logarithms = self._columns(logarithms, self._heads, 1)

        times = torch.arange(size)
        later = times > torch.arange(-1, size).unsqueeze(1)
        decays = emit(aten.exp.default, self._sums(logarithms, later, times.unsqueeze(1) <= times))
        from_start, decays = self._edit.items(emit(aten.split_with_sizes.default, decays, [1, size], -2))
        weights = emit(aten.matmul.default, inputs, outputs)
        weights = emit(aten.mul.Tensor, weights, self._constant(times.unsqueeze(1) <= times))
        y = emit(aten.matmul.default, moved, emit(aten.mul.Tensor, decays, weights))
        final = y
        if self._count > 1 or self._returns_states or values["initial_states"] is not None:
            to_end = emit(aten.slice.Tensor, decays, -1, size - 1, size)
            to_end = emit(aten.reshape.default, to_end, [*node_shape(to_end)[:-2], 1, size])
            added = emit(aten.matmul.default, emit(aten.mul.Tensor, moved, to_end), inputs)
            before, final = self._between(logarithms, added)
            carried = emit(aten.mul.Tensor, emit(aten.matmul.default, before, outputs), from_start)
            y = emit(aten.add.Tensor, y, carried)
        return self._finish(y), final

    def _step(self) -> fx.Node:
        emit, values = self._edit.emit, self._values
        step: fx.Node = values["dt"]
        if values["dt_bias"] is not None:
            step = emit(aten.add.Tensor, step, values["dt_bias"])
        if values["dt_softplus"]:
            step = emit(aten.softplus.default, step)
        if values["dt_max"] is None and (values["dt_softplus"] and values["dt_min"] <= 0):
            return step
        return emit(aten.clamp.default, step, values["dt_min"], values["dt_max"])

    def _between(self, logarithms: fx.Node, added: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The state before each chunk, and the last."""
        emit, count = self._edit.emit, self._count
        total = emit(
            aten.reshape.default, emit(aten.sum.dim_IntList, logarithms, [-1]), [self._batch, count, *self._heads]
        )
        total = emit(aten.clamp.default, self._behind_heads(total), _FORGOTTEN)
        total = emit(aten.unsqueeze.default, total, -2)
        elements = self._width * self._state
        added = emit(aten.reshape.default, added, [self._batch, count, *self._heads, elements])
        added = self._behind_heads(added)
        given = self._values["initial_states"] is not None
        if given:  # it is what a chunk before the first one left
            initial = emit(
                aten.reshape.default, self._values["initial_states"], [self._batch, *self._heads, 1, elements]
            )
            added = emit(aten.cat.default, [initial, added], -2)
            total = emit(aten.constant_pad_nd.default, total, [1, 0])
        chunks = torch.arange(count + given)
        wanted = torch.arange(int(given), count + given + self._returns_states).unsqueeze(1)
        decays = emit(aten.exp.default, self._sums(total, chunks < wanted, chunks.unsqueeze(1) > chunks))
        decays = emit(aten.mul.Tensor, decays, self._constant(chunks < wanted))
        states = emit(aten.matmul.default, decays, added)
        final = states
        if self._returns_states:
            states, final = self._edit.items(emit(aten.split_with_sizes.default, states, [count, 1], -2))
            sizes = [self._batch, *node_shape(self._values["A"]), self._width, self._state]
            final = emit(aten.reshape.default, final, sizes)
        rank = len(self._heads) + 3
        states = emit(aten.permute.default, states, [0, rank - 2, *range(1, rank - 2), rank - 1])
        sizes = [self._batch * count, *self._heads, self._width, self._state]
        return emit(aten.reshape.default, states, sizes), final

    def _behind_heads(self, node: fx.Node) -> fx.Node:
        """(b, S, heads, …) as (b, heads, S, …)."""
        heads = len(self._heads)
        rest = range(heads + 2, node.meta["val"].dim())
        return self._edit.emit(aten.permute.default, node, [0, *range(2, heads + 2), 1, *rest])

    def _sums(self, logarithms: fx.Node, rows: Tensor, columns: Tensor) -> fx.Node:
        """Σ_r logarithms[r] · rows[i, r] · columns[r, j] for every i and j, of (…, 1, r)."""
        chosen = self._edit.emit(aten.mul.Tensor, logarithms, self._constant(rows))
        return self._edit.emit(aten.matmul.default, chosen, self._constant(columns))

    def _constant(self, mask: Tensor) -> fx.Node:
        return self._edit.add_constant("ssd_mask", mask.to(self._values["x"].meta["val"].dtype))

    def _rows(self, node: fx.Node, width: int) -> fx.Node:
        """(b, L, g, n) as (b·S, groups, T, n)."""
        node = self._chunks(node, self._shared, width)
        last = node.meta["val"].dim() - 1
        return self._edit.emit(aten.permute.default, node, [0, *range(2, last), 1, last])

    def _columns(self, node: fx.Node, heads: list[int], width: int) -> fx.Node:
        """(b, L, ·, w) as (b·S, heads, w, T)."""
        node = self._chunks(node, heads, width)
        return self._edit.emit(aten.permute.default, node, [0, *range(2, node.meta["val"].dim()), 1])

    def _chunks(self, node: fx.Node, heads: list[int], width: int) -> fx.Node:
        padding = self._count * self._size - self._length
        if padding:
            node = self._edit.emit(aten.constant_pad_nd.default, node, [0, 0, 0, 0, 0, padding])
        sizes = [self._batch * self._count, self._size, *heads, width]
        return self._edit.emit(aten.reshape.default, node, sizes)

    def _finish(self, y: fx.Node) -> fx.Node:
        """(b·S, heads, p, T) as (b, L, h, p), with the skip and the gate."""
        emit, values = self._edit.emit, self._values
        heads = node_shape(values["A"])[0]
        last = y.meta["val"].dim() - 1
        y = emit(aten.permute.default, y, [0, last, *range(1, last)])
        y = emit(aten.reshape.default, y, [self._batch, self._count * self._size, heads, self._width])
        if self._count * self._size > self._length:
            y = emit(aten.slice.Tensor, y, 1, 0, self._length)
        if values["D"] is not None:
            skip = emit(aten.reshape.default, values["D"], [heads, -1])
            y = emit(aten.add.Tensor, y, emit(aten.mul.Tensor, values["x"], skip))
        if values["z"] is not None:
            y = emit(aten.mul.Tensor, y, emit(aten.silu.default, values["z"]))
        return y
