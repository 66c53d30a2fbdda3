"""Compressed packages from end to end: what is in the file, that it is proven, and that faults in it are found."""

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
from coreml_compressible import lowered, samples
from coreml_mutants import MODEL, WEIGHTS, edited
from coremltools.converters.mil.frontend.milproto import load as milproto

from mobilemix.errors import InputError, UnknownNameError
from mobilemix.quantization.options import Quantization
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Check, Lowered
from mobilemix.targets.coreml import CoreMLTarget, plan
from mobilemix.targets.coreml.executor import Executor
from mobilemix.targets.coreml.package import Operation, Package, read_package

TARGET = CoreMLTarget()
FORMS = (
    ("w8", 16),
    ("w8", 18),
    ("w4", 18),
    ("palette8", 16),
    ("palette6", 18),
    ("palette4", 16),
    ("palette4", 18),
    ("int8", 17),
    ("int8", 18),
)
WEIGHTS_OF_LAYERS = 6
DECOMPRESSING = ("constexpr_affine_dequantize", "constexpr_blockwise_shift_scale", "constexpr_lut_to_dense")


def recipe(precision: str, ios: int, **options: object) -> Recipe:
    return Recipe(precision=precision, minimum_ios=ios, input="tensor", quantization=Quantization(**options))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOBILEMIX_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> Lowered:
    return lowered()


@pytest.fixture(scope="module")
def made(model: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """The package of a recipe, compiled once."""
    folder = tmp_path_factory.mktemp("packages")
    known: dict[Recipe, Path] = {}

    def make(wanted: Recipe) -> Path:
        if wanted not in known:
            known[wanted] = folder / f"{len(known)}.mlpackage"
            TARGET.compile(model, wanted, known[wanted])
        return known[wanted]

    return make


def checks(model: Lowered, wanted: Recipe, path: Path) -> dict[str, Check]:
    return {check.name: check for check in TARGET.checks(model, wanted, path, samples())}


def compressed(package: Package) -> list[Operation]:
    return [operation for operation in package.operations if operation.type.startswith("constexpr_")]


@pytest.mark.parametrize(("precision", "ios"), FORMS)
def test_every_form_is_proven(precision: str, ios: int, model: Lowered, made: Callable[[Recipe], Path]) -> None:
    wanted = recipe(precision, ios)
    found = checks(model, wanted, made(wanted))
    assert {name for name, check in found.items() if check.passed is None} == {"native"}
    assert all(check.passed is not False for check in found.values()), found
    assert f"{precision} equals fp32" in found
    assert ("rounded values" in found) == (precision == "int8")
    assert f"{WEIGHTS_OF_LAYERS} weights" in found["compressed weights"].detail


@pytest.mark.parametrize(
    ("precision", "ios", "operations"),
    [
        ("w8", 16, {"constexpr_affine_dequantize": 6}),
        ("w8", 18, {"constexpr_blockwise_shift_scale": 6}),
        ("w4", 18, {"constexpr_blockwise_shift_scale": 6}),
        ("palette4", 16, {"constexpr_lut_to_dense": 4, "constexpr_affine_dequantize": 2}),
        ("palette6", 18, {"constexpr_lut_to_dense": 4, "constexpr_blockwise_shift_scale": 2}),
        ("int8", 17, {"constexpr_affine_dequantize": 6, "quantize": 3, "dequantize": 3}),
    ],
)
def test_what_a_package_has(
    precision: str, ios: int, operations: dict[str, int], made: Callable[[Recipe], Path]
) -> None:
    package = read_package(made(recipe(precision, ios)))
    types = Counter(operation.type for operation in package.operations)
    found = {name: count for name, count in types.items() if "quantize" in name or name.startswith("constexpr_")}
    assert found == operations


def test_what_stays_in_floating_point(made: Callable[[Recipe], Path]) -> None:
    package = read_package(made(recipe("int8", 17)))
    producers = {output.name: operation for operation in package.operations for output in operation.outputs}
    transforms = [each for each in package.operations if each.outputs[0].name.startswith("mm_default")]
    assert transforms
    for operation in transforms:
        bound = [str(each) for argument in operation.inputs.values() for each in argument]
        assert not {"dequantize", *DECOMPRESSING}.intersection(producers[name].type for name in bound)
    rounded = [operation for operation in package.operations if reads_of(operation, producers) == "dequantize"]
    assert [each.type for each in rounded] == ["conv"] * 3
    stem, depthwise, expand, reduce, gate = [each in rounded for each in package.operations if each.type == "conv"]
    assert (stem, depthwise, expand, reduce, gate) == (True, False, True, True, False)


def reads_of(operation: Operation, producers: dict[str, Operation]) -> str:
    (bound, *_) = operation.inputs.get("x", (None,))
    return producers[bound].type if isinstance(bound, str) and bound in producers else ""


@pytest.mark.parametrize(("precision", "ios"), FORMS)
def test_coremltools_reads_the_same_weights(precision: str, ios: int, made: Callable[[Recipe], Path]) -> None:
    path = made(recipe(precision, ios))
    model = ct.models.MLModel(str(path), skip_model_load=True)
    specification = model.get_spec()
    program = milproto.load(specification, specification.specificationVersion, file_weights_dir=model.weights_dir)
    theirs = {
        each.outputs[0].name: each.materialized_val_inference()
        for each in program.functions["main"].operations
        if each.op_type.startswith("constexpr_")
    }
    package = read_package(path)
    parts = [each for each in package.operations if each.type == "const" or each.type.startswith("constexpr_")]
    ours = dict(
        Executor(dataclasses.replace(package, operations=parts, inputs={}, outputs=()), rounding="fp16").values({})
    )
    assert theirs.keys() == ours.keys()
    assert len(ours) == WEIGHTS_OF_LAYERS
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name].astype(np.float32), rtol=2.0**-10, atol=0)


def test_smaller_forms_are_smaller(made: Callable[[Recipe], Path]) -> None:
    sizes = [
        (made(recipe(precision, 18)) / WEIGHTS).stat().st_size for precision in ("fp16", "w8", "palette6", "palette4")
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_the_same_recipe_gives_the_same_bytes(model: Lowered, made: Callable[[Recipe], Path], tmp_path: Path) -> None:
    for wanted in (recipe("int8", 17), recipe("palette4", 18)):
        again = tmp_path / f"{wanted.precision}.mlpackage"
        TARGET.compile(model, wanted, again)
        for file in (MODEL, WEIGHTS):
            digests = {hashlib.sha256((path / file).read_bytes()).digest() for path in (again, made(wanted))}
            assert len(digests) == 1


def test_patterns_leave_layers_in_float_or_give_them_another_form(
    model: Lowered, made: Callable[[Recipe], Path]
) -> None:
    wanted = recipe("int8", 18, layers=(("*", "w4"), ("expand*", "int8"), ("head", "float"), ("gate", "palette6")))
    path = made(wanted)
    package = read_package(path)
    assert all(check.passed is not False for check in checks(model, wanted, path).values())
    names = [operation.outputs[0].name for operation in compressed(package)]
    assert not any("head" in name for name in names)
    assert sum(operation.type == "constexpr_lut_to_dense" for operation in compressed(package)) == 1
    assert sum(operation.type == "quantize" for operation in package.operations) == 1


def test_weights_rounded_together_are_proven_too(model: Lowered, made: Callable[[Recipe], Path]) -> None:
    wanted = recipe("w4", 18, rounding="adaround")
    path = made(wanted)
    assert all(check.passed is not False for check in checks(model, wanted, path).values())
    nearest = dataclasses.replace(wanted, quantization=Quantization())
    assert (path / WEIGHTS).read_bytes() != (made(nearest) / WEIGHTS).read_bytes()
    assert checks(model, nearest, path)["compressed weights"].passed is False, "they are not the nearest"


def place(package: Path, name: str, part: str) -> int:
    """Where in the weight file a part of a compressed weight begins."""
    operation = next(each for each in compressed(read_package(package)) if name in each.outputs[0].name)
    constant = operation.attributes.get(part) or operation.inputs[part][0]
    assert constant.file_offset is not None
    return constant.file_offset


def change(package: Path, offset: int, planted: Callable[[int], int]) -> None:
    data = bytearray((package / WEIGHTS).read_bytes())
    data[offset] = planted(data[offset])
    (package / WEIGHTS).write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("precision", "ios", "part", "planted"),
    [
        ("w8", 16, "quantized_data", lambda byte: byte ^ 2),
        ("w8", 18, "data", lambda byte: byte ^ 1),
        ("w4", 18, "data", lambda byte: byte ^ 1),
        ("palette6", 18, "indices", lambda byte: byte ^ 1),
        ("palette4", 16, "indices", lambda byte: byte ^ 1),
        ("palette8", 16, "lut", lambda byte: byte ^ 64),
        ("int8", 17, "scale", lambda byte: byte ^ 128),
    ],
)
def test_one_wrong_byte_of_a_weight_is_found(
    precision: str,
    ios: int,
    part: str,
    planted: Callable[[int], int],
    model: Lowered,
    tmp_path: Path,
) -> None:
    wanted, path = recipe(precision, ios), tmp_path / "faulty.mlpackage"
    TARGET.compile(model, wanted, path)
    change(path, place(path, "expand", part), planted)
    found = checks(model, wanted, path)
    assert found["fp32 build"].passed
    assert found["compressed weights"].passed is False
    assert "expand" in found["compressed weights"].detail


def shift_zero_points(block: object) -> None:
    """Of the first pair, in both of its halves."""
    for operation in block.operations:  # type: ignore[attr-defined]
        if operation.outputs and re.search(r"(de)?quantized_zero_point_0$", operation.outputs[0].name):
            value = operation.attributes["val"].immediateValue.tensor.bytes
            value.values = bytes([(value.values[0] + 100) % 256])


def shift_one_zero_point(block: object) -> None:
    """Of one half of a pair."""
    for operation in block.operations:  # type: ignore[attr-defined]
        if operation.outputs and re.search(r"_quantized_zero_point_0$", operation.outputs[0].name):
            value = operation.attributes["val"].immediateValue.tensor.bytes
            value.values = bytes([(value.values[0] + 1) % 256])


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (edited(shift_zero_points), "rounded values"),
        (edited(shift_one_zero_point), "int8 equals fp32"),
    ],
)
def test_a_wrong_zero_point_is_found(
    mutant: Callable[[Path], None], check: str, model: Lowered, tmp_path: Path
) -> None:
    wanted, path = recipe("int8", 17), tmp_path / "faulty.mlpackage"
    TARGET.compile(model, wanted, path)
    mutant(path)
    assert checks(model, wanted, path)[check].passed is False


def test_a_package_that_is_not_compressed_is_not_taken_for_one(model: Lowered, made: Callable[[Recipe], Path]) -> None:
    found = checks(model, recipe("w8", 16), made(recipe("fp16", 16)))
    assert found["compressed weights"] == Check("compressed weights", False, "'b_stem_0_weight' is not compressed")


def test_fewer_bits_than_asked_for_are_found(model: Lowered, made: Callable[[Recipe], Path]) -> None:
    found = checks(model, recipe("w8", 18), made(recipe("w4", 18)))
    assert "4 bits, not those of w8" in found["compressed weights"].detail


def test_another_fault_of_the_program_is_found(tmp_path: Path, model: Lowered) -> None:
    wanted, path = recipe("w8", 16), tmp_path / "faulty.mlpackage"
    TARGET.compile(model, wanted, path)

    @edited
    def other_silu(block: object) -> None:
        next(each for each in block.operations if each.type == "silu").type = "relu"  # type: ignore[attr-defined]

    other_silu(path)
    assert checks(model, wanted, path)["w8 equals fp32"].passed is False


@pytest.mark.parametrize(
    ("precision", "ios", "options", "message"),
    [
        ("w8", 15, {}, "w8 needs iOS 16, not 15; use --minimum-ios 16"),
        ("int8", 16, {}, "int8 needs iOS 17, not 16; use --minimum-ios 17"),
        ("w4", 17, {}, "w4 needs iOS 18, not 17; use --minimum-ios 18"),
        ("w8", 16, {"layers": (("stem*", "w4"),)}, "w4 needs iOS 18"),
        ("w8", 16, {"layers": (("*", "float"),)}, "no layer is left to compress"),
    ],
)
def test_what_core_ml_cannot_do_is_refused(
    precision: str, ios: int, options: dict[str, object], message: str, model: Lowered, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        TARGET.compile(model, recipe(precision, ios, **options), tmp_path / "refused.mlpackage")


@pytest.mark.parametrize(
    ("layers", "message"),
    [((("sten*", "float"),), "unknown layer 'sten*'")],
)
def test_unknown_names_are_refused(
    layers: tuple[tuple[str, str], ...], message: str, model: Lowered, tmp_path: Path
) -> None:
    with pytest.raises(UnknownNameError, match=re.escape(message)):
        TARGET.compile(model, recipe("w8", 16, layers=layers), tmp_path / "refused.mlpackage")


def test_without_the_data_ranges_cannot_be_checked(model: Lowered, made: Callable[[Recipe], Path]) -> None:
    found = checks(model, recipe("int8", 17, data="missing.npz"), made(recipe("int8", 17)))
    assert found["rounded values"].passed is None
    assert "missing.npz" in found["rounded values"].detail


def test_other_data_has_other_ranges(model: Lowered, made: Callable[[Recipe], Path]) -> None:
    found = checks(model, recipe("int8", 17, observer="min-max"), made(recipe("int8", 17)))
    assert found["rounded values"].passed is False
    assert "zero point" in found["rounded values"].detail


def test_values_that_8_bits_do_not_hold_stay_in_float(
    model: Lowered, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "MOST", 1e-3)
    wanted, path = recipe("int8", 17), tmp_path / "some.mlpackage"
    TARGET.compile(model, wanted, path)
    rounded = sum(operation.type == "quantize" for operation in read_package(path).operations)
    assert rounded < 3
    assert checks(model, wanted, path)["rounded values"].passed
    assert checks(model, recipe("int8", 17, layers=(("gate", "float"),)), path)["compressed weights"].passed is False
