"""Core ML packages (.mlpackage): compiled with coremltools, executed on any machine by mobilemix itself."""

import logging

# Without a handler, Python prints coremltools' warnings (an untested torch version, no native library on Linux).
logging.getLogger("coremltools").addHandler(logging.NullHandler())

from mobilemix.targets.coreml.target import CoreMLTarget  # noqa: E402

__all__ = ["CoreMLTarget"]
