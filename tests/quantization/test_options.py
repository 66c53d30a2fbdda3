import dataclasses

import pytest

from mobilemix.errors import InputError, UnknownNameError
from mobilemix.quantization.options import USED, Quantization, check_patterns, check_used, precision_of
from mobilemix.targets import EXTRAS, TARGETS, find_target


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


CHANGED = {
    "data": "pictures",
    "samples": 3,
    "seed": 1,
    "observer": "entropy",
    "format": "s8s8",
    "equalization": "smooth",
    "bias_correction": True,
    "rounding": "adaround",
    "layers": (("stem*", "float"),),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("field", CHANGED)
def test_what_a_precision_has_no_use_for_is_refused(target, field):
    options = Quantization(**{field: CHANGED[field]})
    for precision in find_precisions(target):
        if field in USED[target].get(precision, ()):
            check_used(options, target, precision)
        else:
            with pytest.raises(InputError, match=f"{precision} of the target {target} has no use for .*{field}"):
                check_used(options, target, precision)


def find_precisions(target):
    """All that a target has; LiteRT's and TensorRT's packages are not needed to know them."""
    return find_target(target).precisions if target not in EXTRAS else (*USED[target], "fp32")


def test_the_table_has_every_field_and_no_other_precision():
    assert CHANGED.keys() == {field.name for field in dataclasses.fields(Quantization)}
    for target, used in USED.items():
        assert used.keys() <= set(find_precisions(target))
        assert set(CHANGED).issuperset(field for fields in used.values() for field in fields)


@pytest.mark.parametrize(
    ("target", "precision", "layer", "right"),
    [
        ("onnx", "int8", "int8", True),
        ("onnx", "int8", "w8", False),
        ("onnx", "w4", "w8", True),
        ("onnx", "w8", "w4", False),
        ("coreml", "palette4", "w8", True),
        ("coreml", "int8", "fp8", False),
        ("tensorrt", "int8", "fp8", False),
        ("litert", "int8", "float", True),
    ],
)
def test_precisions_of_layers_beside_another(target, precision, layer, right):
    options = Quantization(layers=(("stem*", layer),))
    if right:
        check_used(options, target, precision)
    else:
        with pytest.raises(UnknownNameError, match=f"precision of layers in {precision} of the target {target}"):
            check_used(options, target, precision)


def test_a_pattern_that_fits_nothing_names_what_is_near():
    layers = [(f"stage_{index}.conv/conv2d_{index}", f"stage_{index}.conv") for index in range(40)]
    check_patterns(Quantization(layers=(("stage_3.conv", "float"), ("*/conv2d_7", "float"))), layers)
    with pytest.raises(UnknownNameError) as caught:
        check_patterns(Quantization(layers=(("stag_3.conv", "float"),)), layers)
    assert "unknown layer 'stag_3.conv'; did you mean 'stage_3.conv'?" in str(caught.value)
    assert len(str(caught.value)) < 250
