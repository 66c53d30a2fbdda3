"""What a model or an artifact is made of, what it costs, and what stands between it and each target."""

from pathlib import Path

from mobilemix.errors import InputError
from mobilemix.inspection.model import inspect_model
from mobilemix.inspection.onnx_file import inspect_onnx
from mobilemix.inspection.package import inspect_package
from mobilemix.inspection.report import (
    ArtifactReport,
    Contributor,
    Cost,
    ModelReport,
    Obstacle,
    Share,
    TargetReport,
    Value,
)
from mobilemix.targets import require

__all__ = [
    "ArtifactReport",
    "Contributor",
    "Cost",
    "ModelReport",
    "Obstacle",
    "Share",
    "TargetReport",
    "Value",
    "inspect_artifact",
    "inspect_model",
]


def inspect_artifact(path: Path) -> ArtifactReport:
    """Inspect an ONNX file, a Core ML package or a LiteRT file, of any origin.

    Raises:
        InputError: it is none of them, or cannot be read.
        MissingDependencyError: a LiteRT file, without the extra that reads them.
    """
    if not path.exists():
        raise InputError(f"there is no artifact {path}")
    if path.suffix == ".tflite":
        require("litert")
        from mobilemix.inspection.litert_file import inspect_litert

        return inspect_litert(path)
    return inspect_package(path) if path.is_dir() else inspect_onnx(path)
