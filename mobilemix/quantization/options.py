"""How to quantise: the `[quantization]` table of a recipe."""

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterable, Mapping

from mobilemix.errors import InputError, UnknownNameError

BUILTIN = "builtin"
OBSERVERS = ("min-max", "moving-average", "percentile", "entropy", "mse")
FORMATS = ("u8s8", "s8s8", "u8u8", "u8s7")
EQUALIZATIONS = ("none", "cross-layer", "smooth")
ROUNDINGS = ("nearest", "adaround")
_COMPRESSED = ("int8", "w8", "w4", "palette8", "palette6", "palette4")
_DATA = ("data", "samples", "seed")
_RANGES = (*_DATA, "observer", "equalization", "layers")
_WEIGHTS = (*_DATA, "rounding", "layers")  # data is for rounding alone
USED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "coreml": {
        "int8": (*_RANGES, "rounding"),
        **dict.fromkeys(_COMPRESSED[1:], _WEIGHTS),
    },
    "litert": {"int8": _RANGES},
    "onnx": {
        "int8": (*_RANGES, "format", "rounding", "bias_correction"),
        "int8-dynamic": (*_WEIGHTS, "equalization"),
        "w8": (*_WEIGHTS, "bias_correction"),
        "w4": (*_WEIGHTS, "bias_correction"),
    },
    **{key: {"int8": _RANGES, "fp8": (*_DATA, "equalization", "layers")} for key in ("tensorrt", "tensorrt-rtx")},
}
"""Fields of `Quantization` that a target's precision has a use for; none of other precisions."""
MIXED = {**{("coreml", precision): _COMPRESSED for precision in _COMPRESSED}, ("onnx", "w4"): ("w8",)}
"""What layers may have in a target's precision, besides it and float."""
NEAR = 5
"""Names of layers that the error about an unknown one states."""
FLOAT = "float"
"""In `Quantization.layers`: what the layer computes in when it is not quantised."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What a quantised artifact is made with; not every field is for every target and precision, see `USED`.

    Attributes:
        data: what values are calibrated on: "builtin" (the shipped photographs), a folder of images, a .npy or .npz.
        samples: at most so many of them; None is all that ship, and 128 of the user's.
        seed: of the choice among more.
        observer: which range of a value the integers span, of `OBSERVERS`; None is the target's own choice.
        format: types of activations and weights in ONNX int8, of `FORMATS`; u8s7 is u8s8 with weights in 7 bits.
        equalization: how channels are scaled to like ranges beforehand, of `EQUALIZATIONS`.
        bias_correction: whether biases make up for the mean error of the weights (arXiv 1906.04721, section 4.2).
        rounding: of weights, "nearest" or "adaround" (arXiv 2004.10568).
        layers: (pattern, precision) of layers that have another precision than the recipe's, "float" among them; a
            pattern, as of file names, is for a layer's name or its module's path; the last that fits counts.
    """

    data: str = BUILTIN
    samples: int | None = None
    seed: int = 0
    observer: str | None = None
    format: str = "u8s8"
    equalization: str = "none"
    bias_correction: bool = False
    rounding: str = "nearest"
    layers: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no quantisation can be made with.

        Raises:
            UnknownNameError: observer, format, equalisation or rounding.
            InputError: a number of samples below one.
        """
        for what, name, valid in (
            ("observer", self.observer, OBSERVERS),
            ("format", self.format, FORMATS),
            ("equalization", self.equalization, EQUALIZATIONS),
            ("rounding", self.rounding, ROUNDINGS),
        ):
            if name is not None and name not in valid:
                raise UnknownNameError(what, name, valid)
        if self.samples is not None and self.samples < 1:
            raise InputError(f"samples must be at least 1, not {self.samples}")


def check_used(options: Quantization, target: str, precision: str) -> None:
    """Refuse what a target's precision has no use for, so that nobody believes it was done.

    Raises:
        InputError: a field that is not as it is when left out.
        UnknownNameError: a precision that layers cannot have beside this one.
    """
    used = USED[target].get(precision, ())
    for field in dataclasses.fields(options):
        if field.name not in used and getattr(options, field.name) != field.default:
            advice = f"it has {', '.join(used)}" if used else "nothing is quantised"
            raise InputError(f"{precision} of the target {target} has no use for quantization.{field.name}; {advice}")
    valid = dict.fromkeys((FLOAT, precision, *MIXED.get((target, precision), ())))
    for _, own in options.layers:
        if own not in valid:
            raise UnknownNameError(f"precision of layers in {precision} of the target {target}", own, valid)


def check_patterns(options: Quantization, layers: Iterable[tuple[str, str]]) -> None:
    """Refuse a pattern that fits no layer, which is one that is misspelt.

    Args:
        options: how to quantise.
        layers: name and module of each.

    Raises:
        UnknownNameError: the pattern, with the names that are nearest.
    """
    known = list(layers)
    for pattern, _ in options.layers:
        if not any(_fits(pattern, *layer) for layer in known):
            names = list(dict.fromkeys(name for layer in known for name in layer if name))
            near = difflib.get_close_matches(pattern.strip("*"), names, n=NEAR, cutoff=0) or names[:NEAR]
            raise UnknownNameError("layer", pattern, (*near, "…") if len(names) > NEAR else names)


def precision_of(options: Quantization, precision: str, name: str, module: str) -> str:
    """Precision of one layer.

    Args:
        options: how to quantise.
        precision: of the layers that no pattern is for.
        name: of the layer, "module/value".
        module: path of the module that the layer is from.
    """
    for pattern, own in reversed(options.layers):
        if _fits(pattern, name, module):
            return own
    return precision


def _fits(pattern: str, name: str, module: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(module, pattern)
