import dataclasses

import pytest

from mobilemix.errors import InputError, UnknownNameError
from mobilemix.quantization.options import Quantization, precision_of


@pytest.mark.parametrize("field", ["observer", "format", "equalization", "rounding"])
def test_names_that_do_not_exist_get_a_suggestion(field):
    with pytest.raises(UnknownNameError, match=r"'msee?|s8|adaround|smooth|mse"):
        Quantization(**{field: {"observer": "mmse", "format": "u8s88", "equalization": "smoth"}.get(field, "adround")})


def test_no_samples_are_none():
    with pytest.raises(InputError, match="at least 1"):
        Quantization(samples=0)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((), "int8"),
        ((("stem*", "float"),), "float"),
        ((("stem.conv", "float"),), "float"),
        ((("stem.conv/conv2d", "w8"),), "w8"),
        ((("head*", "float"),), "int8"),
        ((("*", "float"), ("stem*", "int8")), "int8"),
        ((("stem*", "int8"), ("*", "float")), "float"),
        ((("Stem*", "float"),), "int8"),
    ],
)
def test_the_last_pattern_that_fits_a_layer_or_its_module_counts(layers, expected):
    options = dataclasses.replace(Quantization(), layers=layers)
    assert precision_of(options, "int8", "stem.conv/conv2d", "stem.conv") == expected
