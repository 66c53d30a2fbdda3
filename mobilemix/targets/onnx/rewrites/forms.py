"""Which of equivalent forms ONNX Runtime runs fastest, by shape: every choice that a rule makes by size is here.

The numbers come from `benchmarks/forms.py`, one thread; `benchmarks/forms.py --check` holds the choices against a
new measurement. docs/forms.md has its table.
"""

CHANNEL_MULTIPLE = 4
"""Depthwise convolutions of other numbers of channels run outside the layout of the convolutions around them."""

POSITIONS_AS_ROWS = 49
"""Up to so many positions, a matrix product with packed weights beats a convolution of the sequence."""

HEAD_BYTES = 2 << 20
"""From so many bytes of weights on, more than a core's own cache holds, one row's linear map is a convolution."""

MATRIX_MOVED_WHOLE = 1 << 9
"""Elements of each of a batch of matrices up to which a runtime moves them faster as one large matrix."""


def missing_channels(channels: int) -> int:
    """Channels to add to a depthwise convolution for ONNX Runtime to keep it in the blocked layout."""
    return -channels % CHANNEL_MULTIPLE


def is_product(positions: int) -> bool:
    """Whether to write a pointwise convolution of a sequence of so many positions as a matrix product."""
    return positions <= POSITIONS_AS_ROWS


def is_head(rows: int, weight_bytes: int) -> bool:
    """Whether to write a linear map of so many rows as a convolution of one pixel."""
    return rows == 1 and weight_bytes >= HEAD_BYTES


def is_moved_whole(count: int, elements: int) -> bool:
    """Whether to transpose `count` matrices of so many elements as one that holds them all."""
    return count > 1 and elements <= MATRIX_MOVED_WHOLE
