"""State-space scans as one `Scan` node each, and when that is the better form.

ONNX Runtime runs the body of a `Scan` once a step, at 3 to 4 µs besides the arithmetic. Plain operators over chunks of
time (`mobilemix.passes.lower_scans`) spare most of that but pass several times over memory. So what is computed in a
step decides: `benchmarks/scan.py` compares both, and docs/scans.md has its tables.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import opset18 as op
from torch import fx

from mobilemix.passes.base import arguments, node_shape

LEAST_STATES = 2048
"""Elements of the state from which `Scan` is at least as fast as plain operators; at 1536 they are faster."""

LEAST_STEPS = 32
"""Shorter scans are few plain operators anyhow, which any runtime takes."""


def is_faster(node: fx.Node) -> bool:
    """Whether a scan of the program should be a `Scan` rather than plain operators."""
    values = arguments(node)
    shapes = {name: node_shape(item) for name, item in values.items() if isinstance(item, fx.Node)}
    if "u" in shapes:
        batch, channels, length = shapes["u"]
        states = batch * channels * shapes["A"][1]
        groups = {shapes[name][1] for name in "BC" if len(shapes[name]) == 4} - {1}
        if len(groups) > 1 or any(len(shapes[name]) == 2 for name in "BC"):
            return False  # forms that are rare, and not worth a second translation
    else:
        length, *state = shapes["a"]
        states = math.prod(state)
        if shapes["a"] != shapes["b"]:
            return False
    return bool(length >= LEAST_STEPS and states >= LEAST_STATES)


def selective_scan(
    u: Any,
    delta: Any,
    A: Any,  # noqa: N803, the operator's names
    B: Any,  # noqa: N803
    C: Any,  # noqa: N803
    D: Any = None,  # noqa: N803
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
) -> tuple[Any, Any]:
    """`mobilemix::selective_scan`, with the exponentials, the state (b, g, n, d/g) and the readout in the body."""
    (batch, channels, length), states = u.shape, A.shape[1]
    groups = max((matrix.shape[1] for matrix in (B, C) if len(matrix.shape) == 4), default=1)
    width = channels // groups
    if delta_bias is not None:
        delta = op.Add(delta, _reshape(delta_bias, [channels, 1]))
    if delta_softplus:
        delta = op.Softplus(delta)
    rates = op.Transpose(_reshape(A, [groups, width, states]), perm=[0, 2, 1])
    per_step = [length, batch, groups, 1, width]
    sequences = {
        "step": (_reshape(op.Transpose(delta, perm=[2, 0, 1]), per_step), per_step),
        "moved": (_reshape(op.Transpose(op.Mul(delta, u), perm=[2, 0, 1]), per_step), per_step),
        "inputs": _over_time(B, column=True),
        "outputs": _over_time(C, column=False),
    }

    def write(tape: ir.tape.Tape, state: ir.Value, *now: ir.Value) -> tuple[ir.Value, ir.Value]:
        step, moved, inputs, outputs = now
        decay = tape.op("Exp", [tape.op("Mul", [step, rates])])
        state = tape.op("Add", [tape.op("Mul", [decay, state]), tape.op("Mul", [moved, inputs])])
        return state, tape.op("MatMul", [outputs, state])

    y, last = _scan(u.dtype, [batch, groups, states, width], None, sequences, write)
    y = op.Transpose(_reshape(y, [length, batch, channels]), perm=[1, 2, 0])
    last = _reshape(op.Transpose(last, perm=[0, 1, 3, 2]), [batch, channels, states])
    if D is not None:
        y = op.Add(y, op.Mul(u, _reshape(D, [channels, 1])))
    if z is not None:
        y = op.Mul(y, op.Mul(z, op.Sigmoid(z)))
    return y, last


def linear_scan(a: Any, b: Any, initial: Any = None) -> Any:
    """`mobilemix::linear_scan` of two sequences of one shape."""

    def write(tape: ir.tape.Tape, state: ir.Value, *now: ir.Value) -> tuple[ir.Value, ir.Value]:
        decay, value = now
        state = tape.op("Add", [tape.op("Mul", [decay, state]), value])
        return state, tape.op("Identity", [state])  # an output of its own, as the standard demands

    shape = [int(size) for size in b.shape]
    states, _ = _scan(b.dtype, shape[1:], initial, {"decay": (a, shape), "value": (b, shape)}, write)
    return states


def _over_time(matrix: Any, column: bool) -> tuple[Any, list[int]]:
    """B or C, (b, n, l) or (b, g, n, l), as (l, b, g, n, 1) or (l, b, g, 1, n)."""
    *outer, states, length = matrix.shape
    rank = len(matrix.shape)
    moved = op.Transpose(matrix, perm=[rank - 1, *range(rank - 1)])
    shape = [length, outer[0], *(outer[1:] or [1]), *([states, 1] if column else [1, states])]
    return _reshape(moved, shape), shape


def _scan(
    dtype: ir.DataType,
    state_shape: Sequence[int],
    initial: Any,
    sequences: Mapping[str, tuple[Any, Sequence[int]]],
    write: Callable[..., tuple[ir.Value, ir.Value]],
) -> tuple[Any, Any]:
    """What each step puts out, and the last state, of a state that begins at `initial` or 0.

    Args:
        dtype: of everything.
        state_shape: of the state.
        initial: of what can be broadcast to that shape, or None.
        sequences: name in the body → a tensor over time, the first axis, and its shape.
        write: given a tape, the state and a step of each sequence, writes the new state and the output.
    """
    start: Any = op.Constant(value=ir.tensor(np.zeros(state_shape, dtype.numpy())))
    if initial is not None:
        start = op.Add(start, initial)
    state = ir.val("state", dtype, state_shape)
    slices = [ir.val(name, dtype, shape[1:]) for name, (_, shape) in sequences.items()]
    tape = ir.tape.Tape()
    outputs = write(tape, state, *slices)
    body = ir.Graph([state, *slices], outputs, nodes=tape.nodes, name="step")
    tensors = [tensor for tensor, _ in sequences.values()]
    last = op.Scan(start, *tensors, body=body, num_scan_inputs=len(tensors))
    last.producer().resize_outputs(2)  # the exporter knows of one
    return last.producer().outputs[1], last


def _reshape(x: Any, shape: Sequence[int]) -> Any:
    return op.Reshape(x, op.Constant(value_ints=list(shape)))
