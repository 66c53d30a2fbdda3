"""Rewrites for LiteRT alone: the forms that XNNPACK, its CPU back end, runs fastest."""

from mobilemix.passes.base import Pass
from mobilemix.targets.litert.passes.channels_last import ChannelsLast
from mobilemix.targets.litert.passes.explicit_padding import ExplicitPadding
from mobilemix.targets.litert.passes.split_depthwise import SplitDepthwise

__all__ = ["PASSES"]

PASSES: tuple[Pass, ...] = (
    # First: the passes below, and the converter, read numbers.
    ExplicitPadding(),
    # XNNPACK has kernels for filters of up to 25 taps; what is larger takes a slow path.
    SplitDepthwise(),
    # Last: it decides where every number lies.
    ChannelsLast(),
)
