"""VMamba's csms6s and csm_triton: a map as four sequences, and back.

The four: rows, columns, and both from the end (`scans=0`); rows four times (1); rows twice, and twice from the end (2).
Maps are (b, c, h, w), or (b, h, w, c) where channels are not first; with a sequence of its own for each direction
(`one_by_one`) they have an axis of 4 before c. Sequences are (b, 4, c, l) or (b, l, 4, c).
"""

from typing import Any

import torch
from torch import Tensor

from mobilemix.shims.extensions import selective_scan_without_gate

_COLUMNS = ((1, 3), (), ())  # by `scans`: which of the four go along columns
_REVERSED = ((2, 3), (), (2, 3))  # … and which from the end


def cross_scan_fn(
    x: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,  # noqa: ARG001 -- it always is torch
) -> Tensor:
    """Four sequences of a map."""
    maps = [x] * 4
    if one_by_one:
        maps = list(x.unbind(1) if in_channel_first else x.unbind(3))
    if not in_channel_first:
        maps = [one.permute(0, 3, 1, 2) for one in maps]
    sequences = [_sequence(one, direction, scans) for direction, one in enumerate(maps)]
    return torch.stack(sequences, 1) if out_channel_first else torch.stack([one.mT for one in sequences], 2)


def cross_merge_fn(
    y: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,  # noqa: ARG001 -- as above
) -> Tensor:
    """The sum of four sequences on their map, (b, c, l) or (b, l, c); with `one_by_one` all four, not summed.

    Args:
        y: (b, 4, c, h, w), or (b, h, w, 4, c) where `out_channel_first` is false: as the scan gave them.
        in_channel_first: whether the channels of the result are first, as the scan's input had them.
        out_channel_first: whether those of y are.
        one_by_one: keep the four.
        scans: the directions.
        force_torch: without effect.
    """
    sequences = y.unbind(1) if out_channel_first else [one.permute(0, 3, 1, 2) for one in y.unbind(3)]
    height, width = sequences[0].shape[2:]
    maps = [_map(one.flatten(2), direction, scans, height, width) for direction, one in enumerate(sequences)]
    if one_by_one:
        return torch.stack(maps, 1) if in_channel_first else torch.stack([one.mT for one in maps], 2)
    total = maps[0] + maps[1] + maps[2] + maps[3]
    return total if in_channel_first else total.mT


def _sequence(x: Tensor, direction: int, scans: int) -> Tensor:
    x = (x.mT if direction in _COLUMNS[scans] else x).flatten(2)
    return x.flip(-1) if direction in _REVERSED[scans] else x


def _map(y: Tensor, direction: int, scans: int, height: int, width: int) -> Tensor:
    y = y.flip(-1) if direction in _REVERSED[scans] else y
    if direction in _COLUMNS[scans]:
        return torch.unflatten(y, -1, (width, height)).mT.flatten(2)
    return y


class CrossScan:
    """`cross_scan_fn` as the autograd.Function that it is elsewhere."""

    scans = 0

    @classmethod
    def apply(cls, x: Tensor, *options: Any) -> Tensor:
        """(b, c, h, w) to (b, 4, c, l); further options as in `cross_scan_fn`."""
        return cross_scan_fn(x, *options) if options else cross_scan_fn(x, scans=cls.scans)


class CrossMerge:
    """`cross_merge_fn` likewise."""

    scans = 0

    @classmethod
    def apply(cls, y: Tensor, *options: Any) -> Tensor:
        """(b, 4, c, h, w) to (b, c, l); further options as in `cross_merge_fn`."""
        return cross_merge_fn(y, *options) if options else cross_merge_fn(y, scans=cls.scans)


def getCSM(scans: int = 0) -> tuple[type[CrossScan], type[CrossMerge]]:  # noqa: N802 -- VMamba's name
    """The pair for some directions."""
    return type("CrossScan", (CrossScan,), {"scans": scans}), type("CrossMerge", (CrossMerge,), {"scans": scans})


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    oflex: bool = True,
    backend: str | None = None,  # noqa: ARG001 -- which of VMamba's kernels
) -> Tensor:
    """The scan with VMamba's arguments: u, delta (b, k·c, l); A (k·c, n); B, C (b, k, n, l)."""
    if oflex:
        u = u.to(torch.promote_types(u.dtype, torch.float32))
    return selective_scan_without_gate(u, delta, A, B, C, D, delta_bias, delta_softplus)
