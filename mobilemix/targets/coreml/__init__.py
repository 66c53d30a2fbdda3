"""Core ML packages (.mlpackage): compiled with coremltools, executed on any machine by mobilemix itself."""

import importlib
import logging
import sys
from types import ModuleType


def _import_coremltools() -> None:
    """Import coremltools without what it imports for the optimisation of PyTorch modules, twice as much as itself."""
    if "coremltools" in sys.modules:
        return
    optimisers = "coremltools.optimize.torch"
    sys.modules[optimisers] = ModuleType(optimisers)
    without_transformers = "transformers" not in sys.modules
    if without_transformers:
        sys.modules["transformers"] = None  # type: ignore[assignment]  # how Python spells "not installed"
    try:
        importlib.import_module("coremltools")
    finally:
        # Whoever asks for them gets the real ones.
        del sys.modules[optimisers]
        vars(sys.modules["coremltools.optimize"]).pop("torch", None)
        if without_transformers:
            del sys.modules["transformers"]


# Without a handler, Python prints coremltools' warnings (an untested torch version, no native library on Linux).
logging.getLogger("coremltools").addHandler(logging.NullHandler())
_import_coremltools()

from mobilemix.targets.coreml.target import CoreMLTarget  # noqa: E402

__all__ = ["CoreMLTarget"]
