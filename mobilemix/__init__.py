"""mobilemix: PyTorch vision models that mix tokens with FFTs or state-space scans, exported and proven intact.

    import mobilemix

    mobilemix.list_models()
    result = mobilemix.export("affnet_t", target="onnx", output="out")
    result.parity.passed

The names below are the public interface; each is imported when it is first used, so that `import mobilemix` is instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mobilemix import ops, passes, shims
    from mobilemix.api import Export, Quantized, evaluate, export, quantize, verify
    from mobilemix.errors import MobilemixError
    from mobilemix.evaluation import Evaluation
    from mobilemix.inspection import inspect_artifact, inspect_model
    from mobilemix.manifest import Manifest, read_manifest
    from mobilemix.models.registry import create_model, list_models
    from mobilemix.parity import Agreement, Parity, Tolerance
    from mobilemix.recipe import Recipe, load_recipe

__all__ = [
    "Agreement",
    "Evaluation",
    "Export",
    "Manifest",
    "MobilemixError",
    "Parity",
    "Quantized",
    "Recipe",
    "Tolerance",
    "create_model",
    "evaluate",
    "export",
    "inspect_artifact",
    "inspect_model",
    "list_models",
    "load_recipe",
    "ops",
    "passes",
    "quantize",
    "read_manifest",
    "shims",
    "verify",
]

_HOMES = {
    "Agreement": "mobilemix.parity",
    "Evaluation": "mobilemix.evaluation",
    "Export": "mobilemix.api",
    "Manifest": "mobilemix.manifest",
    "MobilemixError": "mobilemix.errors",
    "Parity": "mobilemix.parity",
    "Quantized": "mobilemix.api",
    "Recipe": "mobilemix.recipe",
    "Tolerance": "mobilemix.parity",
    "create_model": "mobilemix.models.registry",
    "evaluate": "mobilemix.api",
    "export": "mobilemix.api",
    "inspect_artifact": "mobilemix.inspection",
    "inspect_model": "mobilemix.inspection",
    "list_models": "mobilemix.models.registry",
    "load_recipe": "mobilemix.recipe",
    "quantize": "mobilemix.api",
    "read_manifest": "mobilemix.manifest",
    "verify": "mobilemix.api",
}


_MODULES = frozenset({"ops", "passes", "shims"})


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"mobilemix.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mobilemix' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
