"""The export targets: one entry each, imported only when used."""

import importlib
from typing import TYPE_CHECKING

from mobilemix.errors import UnknownNameError

if TYPE_CHECKING:
    from mobilemix.targets.base import Target

TARGETS = {
    "coreml": "mobilemix.targets.coreml:CoreMLTarget",
    "onnx": "mobilemix.targets.onnx:OnnxTarget",
}


def find_target(name: str) -> "Target":
    """The target called `name`.

    Raises:
        UnknownNameError: no such target.
    """
    if name not in TARGETS:
        raise UnknownNameError("target", name, TARGETS)
    module, attribute = TARGETS[name].split(":")
    target: Target = getattr(importlib.import_module(module), attribute)()
    return target
