"""Depthwise convolutions of as many channels as a blocked layout takes."""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import RewriteRule, RewriteRuleClassBase

from mobilemix.targets.onnx.rewrites import forms
from mobilemix.targets.onnx.rewrites.constants import array, constant
from mobilemix.targets.onnx.rewrites.layouts import PARTS, KeepRead, image_of


class AddChannels(RewriteRuleClassBase):  # type: ignore[misc]
    """Add channels of zeros to a depthwise convolution and to the one before it, and cut them off again.

    Before:   x → Conv → (N, 147, H, W) → Conv(group 147) → (N, 147, H, W)
    After:    x → Conv → (N, 148, H, W) → Conv(group 148) → (N, 148, H, W) → Slice → (N, 147, H, W)

    ONNX Runtime computes others in a layout where a kernel takes one channel at a time. One thread: 0.45 of the time
    at (1, 147, 14, 14), 0.38 at (1, 75, 7, 7), both convolutions together.
    """

    def pattern(self, op: Any, x: Any, weight: Any, filters: Any) -> Any:  # noqa: D102
        mixed = op.Conv(x, weight, _allow_other_inputs=True, _outputs=["mixed"])
        return op.Conv(mixed, filters, _allow_other_inputs=True, _outputs=["filtered"])

    def check(self, context: Any, mixed: ir.Value, filtered: ir.Value, **_: ir.Value) -> bool:  # noqa: ARG002, D102
        convs = [mixed.producer(), filtered.producer()]
        shape = filtered.shape
        if shape is None or len(shape) != 4 or any(array(value) is None for conv in convs for value in conv.inputs[1:]):
            return False
        groups = [conv.attributes.get_int("group", 1) for conv in convs]
        channels = int(shape[1])
        depthwise = mixed.shape is not None and groups == [1, channels] and mixed.shape[1] == channels
        return depthwise and forms.missing_channels(channels) > 0

    def rewrite(self, op: Any, x: ir.Value, mixed: ir.Value, filtered: ir.Value, **_: ir.Value) -> ir.Value:  # noqa: D102
        channels = int(filtered.shape[1])
        more = forms.missing_channels(channels)
        for conv, groups in ((mixed.producer(), 1), (filtered.producer(), channels + more)):
            parameters = (
                np.concatenate([part := constant(value), np.zeros((more, *part.shape[1:]), part.dtype)])
                for value in conv.inputs[1:]
            )
            attributes = {**conv.attributes, "group": ir.AttrInt64("group", groups)}
            x = op.Conv(x, *(op.Constant(value=ir.tensor(content)) for content in parameters), **attributes)
        bounds = (op.Constant(value_ints=[bound]) for bound in (0, channels, 1))
        result: ir.Value = op.Slice(x, *bounds)
        return result


class SplitUncut(KeepRead):
    """Let a Split that follows leave the added channels in a part that nothing reads, rather than copy twice.

    Before:   (N, 148, H, W) → Slice → (N, 147, H, W) → Reshape → Split(axis 1) → 3 parts
    After:    (N, 148, H, W) → Reshape → Split(axis 1) → 3 parts, and one that nothing reads
    """

    def __init__(self, parts: int) -> None:
        """Match a Split into `parts`."""
        RewriteRuleClassBase.__init__(self, f"{type(self).__name__}{parts}", remove_nodes=False)
        self._parts = parts

    def pattern(self, op: Any, x: Any, start: Any, stop: Any, axis: Any, shape: Any, sizes: Any) -> Any:  # noqa: D102
        flat = op.Reshape(op.Slice(x, start, stop, axis), shape, _outputs=["flat"])
        return op.Split(flat, sizes, axis=1, _outputs=[f"part{index}" for index in range(self._parts)])

    def check(self, context: Any, x: ir.Value, flat: ir.Value, **bound: ir.Value) -> bool:  # noqa: ARG002, D102
        start, axis, sizes = (array(bound[name]) for name in ("start", "axis", "sizes"))
        from_first = start is not None and start.tolist() == [0] and axis is not None and axis.tolist() == [1]
        whole = from_first and x.shape is not None and image_of(flat) is not None
        return whole and sizes is not None and sizes.size == self._parts

    def rewrite(self, op: Any, x: ir.Value, flat: ir.Value, sizes: ir.Value, **_: ir.Value) -> list[ir.Value]:  # noqa: D102
        batch, channels, *_others = (int(size) for size in x.shape)
        known = constant(sizes).tolist()
        whole = op.Reshape(x, op.Constant(value_ints=[batch, channels, int(flat.shape[2])]))
        uneven = op.Constant(value_ints=[*known, channels - sum(known)])
        parts: list[ir.Value] = op.Split(whole, uneven, axis=1, _outputs=self._parts + 1)
        return parts[:-1]


CONVS: tuple[RewriteRule, ...] = (AddChannels.rule(),)
SPLITS: tuple[RewriteRule, ...] = tuple(SplitUncut.rule(parts) for parts in PARTS)
