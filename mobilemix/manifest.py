"""The record beside every artifact: what it was made from, how, and how closely it matches.

`NAME.mlpackage.manifest.json` stands beside `NAME.mlpackage`. Its `provenance`, the part that follows from the inputs
alone, is also written into the artifact, so that the same inputs still give the same bytes.
"""

import dataclasses
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mobilemix.errors import InputError
from mobilemix.recipe import Recipe, recipe_from
from mobilemix.targets import EXTRAS

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Manifest:
    """One artifact's record.

    Attributes:
        recipe: what was asked for, with every default resolved.
        provenance: model, weights hash, inputs, outputs, passes and versions.
        artifact: file name, SHA-256, bytes and operator histogram.
        parity: what verification found.
        seconds: wall time by stage.
        build: what the target built besides, such as an engine of the artifact, or why it could not.
    """

    recipe: Recipe
    provenance: Mapping[str, Any]
    artifact: Mapping[str, Any]
    parity: Mapping[str, Any]
    seconds: Mapping[str, float]
    build: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The manifest as indented JSON."""
        return dumps(
            {"schema": SCHEMA, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)}}
        )


def dumps(value: Any, *, indent: int | None = 2) -> str:
    """JSON of plain values, dataclasses and paths, in a fixed order."""
    return json.dumps(value, indent=indent, default=_plain, ensure_ascii=False)


def manifest_path(artifact: Path) -> Path:
    """Where an artifact's manifest is."""
    return artifact.with_name(f"{artifact.name}.manifest.json")


def read_manifest(artifact: Path) -> Manifest:
    """The manifest beside an artifact.

    Raises:
        InputError: there is none, or it is not one that this version reads.
    """
    path = manifest_path(artifact)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no manifest {path}; it is written by mobilemix export") from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the manifest {path}: {error}") from error
    if not isinstance(table, dict) or table.get("schema") != SCHEMA:
        raise InputError(f"{path} is not a manifest of schema {SCHEMA}; export the model again")
    try:
        recipe = {key: value for key, value in table["recipe"].items() if value is not None}
        return Manifest(
            recipe=recipe_from(recipe, base=Path()),
            provenance=table["provenance"],
            artifact=table["artifact"],
            parity=table["parity"],
            seconds=table["seconds"],
            build=table.get("build", {}),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the manifest {path} is incomplete ({error}); export the model again") from error


def versions(target: str) -> dict[str, str]:
    """Of Python and of the packages that decide what an artifact of the target holds."""
    names = ["mobilemix", "torch", "numpy", "onnx", "onnxscript", "onnx-ir", "onnxsim", "onnxruntime", "coremltools"]
    names += EXTRAS.get(target, {}).values()
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
