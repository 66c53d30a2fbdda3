"""Loops over time, which a captured graph holds step by step, as scans."""

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

import mobilemix.ops  # noqa: F401, registers linear_scan
from mobilemix.passes.base import Pass, PassResult, node_shape
from mobilemix.passes.editing import Edit
from mobilemix.passes.reroll_loops import assignments, readouts, recurrences
from mobilemix.passes.reroll_loops.lanes import Lanes
from mobilemix.passes.reroll_loops.recurrences import Recurrence

aten = torch.ops.aten

_FILLED: dict[Any, int] = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
}
"""What operators fill a tensor with whose other properties they take from one."""


class RerollLoops(Pass):
    """Compute a recurrence by one scan, and what is read from its states at once, rather than step by step.

        before:  a, b (B, L, C), w (C, D); for t = 0 … L − 1:  h_t (B, C) = a[:, t]·h_{t−1} + b[:, t];  y_t = h_t @ w
                 stack (y_0 … y_{L−1}, dim 1) → y (B, L, D)
        after:   a, b → permute (L, B, C) → linear_scan → h (L, B, C) → matmul w → permute → y (B, L, D)

    A state has to be affine in the one before, elementwise: a product with, and a sum of, what does not depend on it.
    All else at a step may be any operators, the same ones at every step, on what is the same at every step, on slices
    that move with the step, and on other such states. What does not fit, such as a GRU, stays as it is (the reason is
    logged at the level of debug), as do loops of fewer than eight steps, and programs that write into tensors.
    """

    name = "reroll_loops"

    def rewrite(self, program: ExportedProgram) -> PassResult:
        """Return the program with its linear recurrences as scans."""
        if any(_writes(node) for node in program.graph.nodes):
            return PassResult(program, False)
        edit = Edit(program, tentative=True)
        assignments.forward(edit)
        _forget_shapes(edit)
        lanes = Lanes(edit)
        found = _roll_all(lanes)
        joined = [(readout.node, readout.join(lanes)) for readout in readouts.find(lanes)] if found else []
        unused = _Unused(edit)
        for old, new in joined:
            if new is not None:
                edit.replace(old, new)
                unused.erase(old)
        for recurrence in found:
            _replace_states(edit, recurrence, unused)
        return edit.finish()


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _roll_all(lanes: Lanes) -> list[Recurrence]:
    """Every chain that can be rolled; one may have to wait for another."""
    waiting, found, done, progress = recurrences.find(lanes), list[Recurrence](), set[fx.Node](), True
    while progress:
        progress = False
        for chain in list(waiting):
            if chain.states[-1] in done:
                waiting.remove(chain)  # another value of the same loop, such as a_t·h_{t−1}
            elif rolled := recurrences.roll(lanes, chain):
                waiting.remove(chain)
                found += rolled
                done.update(*(recurrence.body for recurrence in rolled))
                progress = True
    return found


def _replace_states(edit: Edit, recurrence: Recurrence, unused: "_Unused") -> None:
    """Take the states that are used one by one from all of them; the last first, so that the loop before it is dead."""
    *others, last = recurrence.states
    edit.replace(last, recurrence.last)
    unused.erase(last)
    for step, state in reversed([*enumerate(others)]):
        if state.users:
            with edit.at(state), edit.graph.inserting_after(recurrence.found):
                edit.replace(state, edit.emit(aten.select.int, recurrence.found, 0, step))
        unused.erase(state)


class _Unused:
    """Removal of nodes that nothing uses, without a walk over the whole graph."""

    def __init__(self, edit: Edit) -> None:
        self._edit, self._live = edit, set(edit.graph.nodes)

    def erase(self, node: fx.Node) -> None:
        """Remove the node, and what only it needs, if nothing uses it."""
        nodes = [node]
        while nodes:
            node = nodes.pop()
            if node in self._live and node.op == "call_function" and not node.users:
                nodes += node.all_input_nodes
                self._live.remove(node)
                self._edit.erase(node)


def _forget_shapes(edit: Edit) -> None:
    """Compute what has only the shape of a state without it; this does not count as a change."""
    for node in list(edit.graph.nodes):
        if node.target in _FILLED:
            with edit.at(node):
                dtype = node.meta["val"].dtype
                value = edit.emit(aten.full.default, list(node_shape(node)), _FILLED[node.target], dtype=dtype)
            node.replace_all_uses_with(value)
