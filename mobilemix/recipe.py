"""What one deployment asks for: model × weights × target × precision × input × tolerance × budgets.

The command line's options and a recipe file (`mobilemix export --recipe FILE`, TOML) fill the same frozen dataclass.
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mobilemix.errors import InputError, UnknownNameError

DEFAULT_MODEL = "affnet_et_flowers"
PRECISIONS = ("fp16", "fp32")
INPUT_KINDS = ("image", "tensor")
MINIMUM_IOS = (15, 16, 17, 18)
OPSETS = range(18, 22)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One artifact to make.

    Attributes:
        model: a registry name, or `path/to/file.py:factory`, or `package.module:factory`.
        weights: a safetensors or torch checkpoint; None keeps the model's own weights.
        target: a name in `mobilemix.targets.TARGETS`.
        precision: "fp16" or "fp32"; None is the target's default.
        input_shape: (batch, channels, height, width), or any fixed shape for a model of the user's own; None is the model's own.
        input: "image" (Core ML ImageType with the normalisation folded in) or "tensor"; other targets always take tensors.
        opset: ONNX opset version.
        minimum_ios: oldest iOS that must run the Core ML package.
        labels: file with one class name a line; None uses the model's own where it has them.
        tolerance: largest relative L2 error of the logits against the float64 source; None is the tier of the precision.
        max_size_mb: budget for the artifact's size, in 10^6 bytes; None is no budget.
        max_latency_ms: budget for the median latency on the recipe's device, in milliseconds; None is no budget.
    """

    model: str = DEFAULT_MODEL
    weights: Path | None = None
    target: str = "coreml"
    precision: Literal["fp16", "fp32"] | None = None
    input_shape: tuple[int, ...] | None = None
    input: Literal["image", "tensor"] = "image"
    opset: int = 18
    minimum_ios: int = 16
    labels: Path | None = None
    tolerance: float | None = None
    max_size_mb: float | None = None
    max_latency_ms: float | None = None

    def __post_init__(self) -> None:
        """Refuse values outside the tables above.

        Raises:
            UnknownNameError: precision or input kind.
            InputError: opset, iOS version, shape or a budget out of range.
        """
        if self.precision is not None and self.precision not in PRECISIONS:
            raise UnknownNameError("precision", self.precision, PRECISIONS)
        if self.input not in INPUT_KINDS:
            raise UnknownNameError("input kind", self.input, INPUT_KINDS)
        if self.opset not in OPSETS:
            raise InputError(f"opset {self.opset} is not supported; valid: {OPSETS.start} to {OPSETS.stop - 1}")
        if self.minimum_ios not in MINIMUM_IOS:
            raise InputError(f"iOS {self.minimum_ios} is not supported; valid: {', '.join(map(str, MINIMUM_IOS))}")
        if self.input_shape is not None and (not self.input_shape or min(self.input_shape) < 1):
            raise InputError(f"input shape {self.input_shape} has a dimension below 1; give e.g. 1x3x224x224")
        for name in ("tolerance", "max_size_mb", "max_latency_ms"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be above 0, not {value}")


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML file; relative paths in it are relative to the file.

    Raises:
        InputError: unreadable file, malformed TOML, or a value of the wrong type.
        UnknownNameError: a key that no recipe has.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"cannot read the recipe {path}: {error}") from error
    return recipe_from(table, base=path.parent)


def recipe_from(table: Mapping[str, Any], base: Path) -> Recipe:
    """Build a recipe from plain values (as TOML or JSON give them); see `load_recipe` for the errors."""
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            raise UnknownNameError("recipe key", key, fields)
        values[key] = _coerce(key, value, base)
    return Recipe(**values)


def _coerce(key: str, value: Any, base: Path) -> Any:
    """Turn one TOML value into the field's type."""
    if key in ("weights", "labels") and isinstance(value, str):
        return base / value
    if key == "input_shape" and isinstance(value, list) and all(type(size) is int for size in value):
        return tuple(value)
    if key in ("model", "target", "precision", "input") and isinstance(value, str):
        return value
    if key in ("opset", "minimum_ios") and type(value) is int:
        return value
    if key in ("tolerance", "max_size_mb", "max_latency_ms") and type(value) in (int, float):
        return float(value)
    raise InputError(f"the recipe's '{key}' cannot be {value!r}")
