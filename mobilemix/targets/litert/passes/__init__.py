"""Rewrites for LiteRT alone: forms that XNNPACK runs faster, or that its converter takes."""

from mobilemix.passes import Pass

PASSES: tuple[Pass, ...] = ()
