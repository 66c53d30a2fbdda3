"""How to quantise: the `[quantization]` table of a recipe."""

import dataclasses
import fnmatch

from mobilemix.errors import InputError, UnknownNameError

BUILTIN = "builtin"
OBSERVERS = ("min-max", "moving-average", "percentile", "entropy", "mse")
FORMATS = ("u8s8", "s8s8", "u8u8", "u8s7")
EQUALIZATIONS = ("none", "cross-layer", "smooth")
ROUNDINGS = ("nearest", "adaround")
FLOAT = "float"
"""In `Quantization.layers`: what the layer computes in when it is not quantised."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What a quantised artifact is made with; the targets that have no use for a field ignore none: they refuse it.

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


def precision_of(options: Quantization, precision: str, name: str, module: str) -> str:
    """Precision of one layer.

    Args:
        options: how to quantise.
        precision: of the layers that no pattern is for.
        name: of the layer, "module/value".
        module: path of the module that the layer is from.
    """
    for pattern, own in reversed(options.layers):
        if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(module, pattern):
            return own
    return precision
