"""What one deployment asks for: model × weights × target × precision × input × tolerance × size budget.

The command line's options and a recipe file (`mobilemix export --recipe FILE`, TOML) fill the same frozen dataclass.
"""

import dataclasses
import json
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from mobilemix.errors import InputError, UnknownNameError
from mobilemix.quantization.options import BUILTIN, FLOAT, Quantization
from mobilemix.shims import SHIMS
from mobilemix.targets import TARGETS

DEFAULT_MODEL = "affnet_et_flowers"
Precision = Literal[
    "fp16", "fp32", "int8", "bf16", "fp8", "int8-dynamic", "w8", "w4", "palette8", "palette6", "palette4"
]
InputKind = Literal["image", "tensor"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
INPUT_KINDS: tuple[str, ...] = get_args(InputKind)
CALIBRATED = ("int8", "fp8")
"""Precisions whose ranges are observed on data."""
INPUT_DTYPES = ("float32", "complex64", "int64", "int32", "bool")
MINIMUM_IOS = (15, 16, 17, 18)
HARDWARE = ("none", "ampere_plus", "same_compute_capability")
TARGETS_OF = {
    "dynamic_batch": ("onnx", "tensorrt", "tensorrt-rtx"),
    "workspace_mb": ("tensorrt", "tensorrt-rtx"),
    "timing_cache": ("tensorrt",),
    "hardware_compatibility": ("tensorrt",),
    "version_compatible": ("tensorrt",),
}
"""Fields that only some targets have."""
OPSETS = range(18, 23)
LEAST_OPSETS = {"int8": 19, "fp8": 19, "w4": 21, "bf16": 22}
"""ONNX opsets that first have scales in float16, 8-bit floats, scales of blocks, and convolutions in bfloat16; else any
of `OPSETS`."""
USUAL_OPSETS = {("onnx", "int8"): 20}
"""Where the recipe names none, and newer ones bring something: one operator for GELU, which ONNX Runtime cannot put
together from its parts where they read rounded values."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One artifact to make.

    Attributes:
        model: a registry name, or `path/to/file.py:factory`, or `package.module:factory`.
        weights: a safetensors or torch checkpoint; None keeps the model's own weights.
        target: a name in `mobilemix.targets.TARGETS`.
        precision: of `PRECISIONS`, as the target has it; None is the target's default.
        input: "image" (Core ML ImageType with the normalisation folded in) or "tensor"; None is an image where the
            target and the model have one.
        input_shapes: shape of each input, (batch, channels, height, width) for the shipped models; empty is the
            model's own.
        input_dtypes: dtype of each input, from `INPUT_DTYPES`; empty is float32 for all.
        mean, std: per-channel normalisation of [0, 1] pixels; empty is the model's own.
        dynamic_batch: smallest, most frequent and largest batch of an artifact that leaves it open; the batch is the
            first axis of every input where it has the first input's size. None is a fixed batch.
        opset: ONNX opset version; None is the oldest of `OPSETS` that has the precision.
        minimum_ios: oldest iOS that must run the Core ML package.
        labels: file with one class name a line; None uses the model's own where it has them.
        shim: names of `mobilemix.shims.SHIMS`: packages to stand in for while the model is loaded and run.
        tolerance: largest relative L2 error of the outputs against the float64 source; None is the precision's tier.
        max_size_mb: budget for the artifact's size in 10^6 bytes; None is no budget.
        workspace_mb: scratch memory that an engine's kernels may take, in 2^20 bytes; None leaves it to the builder.
        timing_cache: file of kernel times, which the engine's builder reads and writes; None is no file.
        hardware_compatibility: other GPUs that must run the engine, of `HARDWARE`; None is the one that built it.
        version_compatible: whether newer TensorRT of the same major version must run the engine.
        quantization: how, for a precision that quantises.
    """

    model: str = DEFAULT_MODEL
    weights: Path | None = None
    target: str = "coreml"
    precision: Precision | None = None
    input: InputKind | None = None
    input_shapes: tuple[tuple[int, ...], ...] = ()
    input_dtypes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    dynamic_batch: tuple[int, int, int] | None = None
    opset: int | None = None
    minimum_ios: int = 16
    labels: Path | None = None
    shim: tuple[str, ...] = ()
    tolerance: float | None = None
    max_size_mb: float | None = None
    workspace_mb: int | None = None
    timing_cache: Path | None = None
    hardware_compatibility: str | None = None
    version_compatible: bool = False
    quantization: Quantization = dataclasses.field(default_factory=Quantization)

    def __post_init__(self) -> None:
        """Refuse values that no recipe can have.

        Raises:
            UnknownNameError: target, precision, input kind, dtype, shim or hardware compatibility.
            InputError: opset, iOS version, a shape, the normalisation or a budget out of range; or a field that the
                target does not have.
        """
        for name in self.shim:
            if name not in SHIMS:
                raise UnknownNameError("shim", name, SHIMS)
        if self.target not in TARGETS:
            raise UnknownNameError("target", self.target, TARGETS)
        if self.precision is not None and self.precision not in PRECISIONS:
            raise UnknownNameError("precision", self.precision, PRECISIONS)
        if self.input is not None and self.input not in INPUT_KINDS:
            raise UnknownNameError("input kind", self.input, INPUT_KINDS)
        if self.opset is not None and self.opset not in OPSETS:
            raise InputError(f"opset {self.opset} is not supported; valid: {OPSETS.start} to {OPSETS.stop - 1}")
        if self.minimum_ios not in MINIMUM_IOS:
            raise InputError(f"iOS {self.minimum_ios} is not supported; valid: {', '.join(map(str, MINIMUM_IOS))}")
        for shape in self.input_shapes:
            if not shape or min(shape) < 1:
                raise InputError(f"input shape {shape} has no size or one below 1; give e.g. 1x3x224x224")
        for dtype in self.input_dtypes:
            if dtype not in INPUT_DTYPES:
                raise UnknownNameError("input dtype", dtype, INPUT_DTYPES)
        if self.input_dtypes and len(self.input_dtypes) != len(self.input_shapes):
            raise InputError(
                f"{len(self.input_dtypes)} input dtypes do not fit {len(self.input_shapes)} shapes; give one for each"
            )
        if len(self.mean) != len(self.std) or not all(value > 0 for value in self.std):
            raise InputError(f"mean {self.mean} and std {self.std} must have one value a channel, std above 0")
        sizes = (1, 1, 1) if self.dynamic_batch is None else self.dynamic_batch
        if len(sizes) != 3 or not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            given = ",".join(map(str, sizes))
            raise InputError(f"dynamic_batch {given} is not min,opt,max with 1 <= min <= opt <= max, such as 1,8,64")
        for name in ("tolerance", "max_size_mb", "workspace_mb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"{name} must be above 0, not {value}")
        for name, targets in TARGETS_OF.items():
            if getattr(self, name) and self.target not in targets:
                raise InputError(f"the target {self.target} has no {name}; only {' and '.join(targets)} can have it")
        for _, precision in self.quantization.layers:
            if precision != FLOAT and precision not in PRECISIONS:
                raise UnknownNameError("precision of layers", precision, (FLOAT, *PRECISIONS))
        if self.hardware_compatibility is not None and self.hardware_compatibility not in HARDWARE:
            raise UnknownNameError("hardware compatibility", self.hardware_compatibility, HARDWARE)


def opset_of(recipe: Recipe) -> int:
    """The ONNX opset version that a recipe asks for, or needs.

    Raises:
        InputError: it asks for an older one than it needs.
    """
    least = LEAST_OPSETS.get(str(recipe.precision), OPSETS.start)
    if recipe.opset is not None and recipe.opset < least:
        raise InputError(f"{recipe.precision} needs opset {least}, not {recipe.opset}; leave out --opset")
    return recipe.opset or USUAL_OPSETS.get((recipe.target, str(recipe.precision)), least)


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


def write_recipe(recipe: Recipe, path: Path) -> None:
    """Write a recipe as TOML that `load_recipe` reads as the same one.

    Files that lie below the working directory, as the recipe's does, are named relative to the recipe; others in full.
    """
    here, base = Path.cwd(), path.parent.resolve()

    def named(file: Path) -> str:
        file = file.resolve()
        near = file.is_relative_to(here) and base.is_relative_to(here)
        return os.path.relpath(file, base) if near else str(file)

    def plain(value: Any) -> Any:
        return named(value) if isinstance(value, Path) else value

    how = recipe.quantization
    table = {field.name: plain(getattr(recipe, field.name)) for field in dataclasses.fields(recipe)}
    quantization = {field.name: getattr(how, field.name) for field in dataclasses.fields(how)}
    if how.data != BUILTIN and Path(how.data).exists():
        quantization["data"] = named(Path(how.data))
    layers: dict[str, str] = {}
    for pattern, precision in how.layers:
        layers.pop(pattern, None)  # the last of the same pattern counts, in its place
        layers[pattern] = precision
    lines = [
        *_lines({name: value for name, value in table.items() if name != "quantization"}),
        "\n[quantization]",
        *_lines({name: value for name, value in quantization.items() if name != "layers"}),
        *(["\n[quantization.layers]"] if layers else []),
        *_lines({_toml(pattern): precision for pattern, precision in layers.items()}),
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _lines(table: Mapping[str, Any]) -> Iterator[str]:
    """One for each value; what TOML has no word for, None, is left out, as is what is empty."""
    for key, value in table.items():
        if value is not None and value != ():
            yield f"{key} = {_toml(value)}"


def _toml(value: Any) -> str:
    """Texts, numbers, booleans and lists are written as in JSON, but for one character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", r"\u007f")


def recipe_from(table: Mapping[str, Any], base: Path) -> Recipe:
    """Build a recipe from plain values (as TOML or JSON give them); see `load_recipe` for the errors."""
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in _READERS:
            raise UnknownNameError("recipe key", key, _READERS)
        try:
            values[key] = _READERS[key](value, base)
        except (TypeError, ValueError):
            raise InputError(f"the recipe's '{key}' cannot be {value!r}") from None
    return Recipe(**values)


def _text(value: Any, _base: Path) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _path(value: Any, base: Path) -> Path:
    return base / _text(value, base)


def _boolean(value: Any, _base: Path) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _integer(value: Any, _base: Path) -> int:
    if type(value) is not int:  # bool is an int, but no recipe means it so
        raise TypeError
    return value


def _number(value: Any, _base: Path) -> float:
    if type(value) not in (int, float):
        raise TypeError
    return float(value)


def _numbers(value: Any, base: Path) -> tuple[float, ...]:
    return tuple(_number(item, base) for item in value)


def _integers(value: Any, base: Path) -> tuple[int, ...]:
    return tuple(_integer(item, base) for item in value)


def _texts(value: Any, base: Path) -> tuple[str, ...]:
    """Accept one text or a list of them."""
    return tuple(_text(item, base) for item in ([value] if isinstance(value, str) else value))


def _shapes(value: Any, base: Path) -> tuple[tuple[int, ...], ...]:
    """Accept one shape ([1, 3, 224, 224]) or a list of them."""
    shapes = value if value and isinstance(value[0], list | tuple) else [value]
    return tuple(tuple(_integer(size, base) for size in shape) for shape in shapes)


def _quantization(value: Any, base: Path) -> Quantization:
    if not isinstance(value, Mapping):
        raise TypeError
    fields: dict[str, Any] = {}
    for key, item in value.items():
        if key not in _QUANTIZATION_READERS:
            raise UnknownNameError("key of the recipe's [quantization]", key, _QUANTIZATION_READERS)
        try:
            fields[key] = _QUANTIZATION_READERS[key](item, base)
        except (TypeError, ValueError):
            raise InputError(f"the recipe's 'quantization.{key}' cannot be {item!r}") from None
    return Quantization(**fields)


def _data(value: Any, base: Path) -> str:
    return value if value == BUILTIN else str(_path(value, base))


def _layers(value: Any, base: Path) -> tuple[tuple[str, str], ...]:
    """Accept a table, pattern = precision, in its order; or a list of pairs, as JSON gives them."""
    pairs = value.items() if isinstance(value, Mapping) else [(key, item) for key, item in value]
    return tuple((_text(pattern, base), _text(precision, base)) for pattern, precision in pairs)


_QUANTIZATION_READERS: dict[str, Callable[[Any, Path], Any]] = {
    "data": _data,
    "samples": lambda value, base: None if value is None else _integer(value, base),
    "seed": _integer,
    "observer": lambda value, base: None if value is None else _text(value, base),
    "format": _text,
    "equalization": _text,
    "bias_correction": _boolean,
    "rounding": _text,
    "layers": _layers,
}

_READERS: dict[str, Callable[[Any, Path], Any]] = {
    "model": _text,
    "weights": _path,
    "target": _text,
    "precision": _text,
    "input": _text,
    "input_shapes": _shapes,
    "input_dtypes": _texts,
    "mean": _numbers,
    "std": _numbers,
    "dynamic_batch": _integers,
    "opset": _integer,
    "minimum_ios": _integer,
    "labels": _path,
    "shim": _texts,
    "tolerance": _number,
    "max_size_mb": _number,
    "workspace_mb": _integer,
    "timing_cache": _path,
    "hardware_compatibility": _text,
    "version_compatible": _boolean,
    "quantization": _quantization,
}
