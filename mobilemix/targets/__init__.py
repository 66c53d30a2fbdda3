"""The export targets: one entry each, imported only when used."""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from mobilemix.errors import MissingDependencyError, UnknownNameError

if TYPE_CHECKING:
    from mobilemix.targets.base import Target

TARGETS = {
    "coreml": "mobilemix.targets.coreml:CoreMLTarget",
    "litert": "mobilemix.targets.litert:LiteRTTarget",
    "onnx": "mobilemix.targets.onnx:OnnxTarget",
    "tensorrt": "mobilemix.targets.tensorrt.target:TensorRTTarget",
    "tensorrt-rtx": "mobilemix.targets.tensorrt.target:TensorRTForRTXTarget",
}

EXTRAS = {
    "litert": {
        "litert_torch": "litert-torch",
        "ai_edge_litert": "ai-edge-litert",
        "ai_edge_quantizer": "ai-edge-quantizer",
    },
    "tensorrt-rtx": {
        "onnxruntime_ep_nv_tensorrt_rtx": "onnxruntime-ep-nv-tensorrt-rtx-cu13",
        "tensorrt_rtx_bindings": "tensorrt-rtx-cu13-bindings",
    },
}
"""Targets that need an extra of their own name: its modules, and their packages."""


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


def is_installed(name: str) -> bool:
    """Whether the packages that a target needs are there."""
    return not _missing(name)


def require(name: str) -> None:
    """Make sure that a target can be used, before a model is loaded for it.

    Raises:
        MissingDependencyError: it needs an extra that is not installed.
    """
    if missing := _missing(name):
        raise MissingDependencyError(missing[0], f"the target {name}", name)


def _missing(name: str) -> list[str]:
    return [package for module, package in EXTRAS.get(name, {}).items() if importlib.util.find_spec(module) is None]
