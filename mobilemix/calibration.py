"""Inputs that show quantisation which values a model computes, where its user gives none."""

import numpy as np

from mobilemix import assets
from mobilemix.errors import InputError
from mobilemix.preprocess import Preprocess
from mobilemix.signature import inputs_of
from mobilemix.targets.base import Inputs, Lowered

DIMMED = 0.7
"""Contrast of the faint copy of each photograph, of values after normalisation."""


def calibration(lowered: Lowered) -> list[Inputs]:
    """The shipped photographs as the model takes them, and each mirrored, upside down and with less contrast.

    Raises:
        InputError: the model takes no image, or more than one at a time.
    """
    first, *others = inputs_of(lowered.program)
    single = first.shape[0] == 1 or lowered.dynamic_batch is not None
    if lowered.mean is None or lowered.std is None or others or len(first.shape) != 4 or not single:
        raise InputError(
            "8-bit values are calibrated on photographs, one at a time, and the model's input is no image; "
            "use --precision fp16"
        )
    preprocess = Preprocess(*first.shape[2:], lowered.mean, lowered.std)
    photographs = [preprocess(path) for path in assets.photographs()]
    shown = [
        image
        for photograph in photographs
        for image in (photograph, photograph[..., ::-1], photograph[:, :, ::-1], photograph * np.float32(DIMMED))
    ]
    return [{first.name: np.ascontiguousarray(image)} for image in shown]
