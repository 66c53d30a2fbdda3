"""One small network in every precision: a conversion costs seconds, so all tests share three of them."""

import dataclasses
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import NETWORK

from mobilemix import api
from mobilemix.errors import InputError
from mobilemix.inspection import inspect_artifact
from mobilemix.parity import relative_l2
from mobilemix.recipe import Recipe
from mobilemix.targets import find_target

pytest.importorskip("litert_torch", reason="needs pip install 'mobilemix[litert]'")

import flatbuffers
from ai_edge_litert import schema_py_generated as schema

from mobilemix.targets.litert import checks, convert, flatbuffer, metadata
from mobilemix.targets.litert.runtime import LiteRTRunner

PRECISIONS = ("fp32", "fp16", "int8")
LABELS = ("ash", "beech", "cedar", "dogwood")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SHAPE = (1, 3, 16, 16)
ROUNDING = {"fp32": 1e-6, "fp16": 1e-3, "int8": 0.1}


@pytest.fixture(scope="module")
def recipe(folder: Path) -> Recipe:
    """Of the network as a classifier of images with names for its classes."""
    (folder / "spectral_net.py").write_text(NETWORK)
    (folder / "labels.txt").write_text("\n".join(LABELS))
    return Recipe(
        model=f"{folder}/spectral_net.py:make",
        target="litert",
        input_shapes=(SHAPE,),
        mean=MEAN,
        std=STD,
        labels=folder / "labels.txt",
    )


@pytest.fixture(scope="module")
def prepared(recipe: Recipe) -> api.Prepared:
    return api.prepare(recipe)


@pytest.fixture(scope="module")
def exports(prepared: api.Prepared, recipe: Recipe, folder: Path) -> dict[str, api.Export]:
    return {
        precision: api.deploy(prepared, dataclasses.replace(recipe, precision=precision), folder / precision)
        for precision in PRECISIONS
    }


def test_the_table_finds_it() -> None:
    target = find_target("litert")
    assert (target.name, target.suffix, target.precisions[0]) == ("litert", ".tflite", "fp32")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_network_arrives_intact(exports: dict[str, api.Export], precision: str) -> None:
    parity = exports[precision].parity
    assert parity.passed, parity
    assert exports[precision].path.name == "make.tflite"
    assert parity.agreement["photographs"].relative_l2 < ROUNDING[precision]
    assert parity.agreement["photographs"].top1 == 1


def test_smaller_numbers_make_smaller_files(exports: dict[str, api.Export]) -> None:
    weights = {name: inspect_artifact(export.path).weight_dtypes for name, export in exports.items()}
    assert set(weights["fp32"]) <= {"float32", "int32"}
    assert weights["fp16"]["float16"] > weights["fp16"]["float32"]
    assert weights["int8"]["int8"] > 800, "the convolution's 864, and the classifier's"
    assert weights["int8"].get("float32", 0) < 100
    assert weights["fp32"]["float32"] > 1.9 * (weights["int8"]["int8"] + weights["int8"]["float16"])


def test_the_same_program_gives_the_same_bytes(
    prepared: api.Prepared, recipe: Recipe, exports: dict[str, api.Export], folder: Path
) -> None:
    convert.float_build.cache_clear()
    again = api.deploy(prepared, dataclasses.replace(recipe, precision="fp32"), folder / "again")
    assert again.path.read_bytes() == exports["fp32"].path.read_bytes()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inputs_and_outputs_keep_their_names_shapes_and_dtypes(exports: dict[str, api.Export], precision: str) -> None:
    report = inspect_artifact(exports[precision].path)
    assert [(value.name, value.dtype, value.shape) for value in report.inputs] == [("image", "float32", SHAPE)]
    assert [(value.name, value.dtype, value.shape) for value in report.outputs] == [("logits", "float32", (1, 4))]
    assert report.provenance is not None
    assert report.provenance["precision"] == precision
    assert report.provenance["versions"]["litert-torch"]


def test_what_inspection_counts(exports: dict[str, api.Export]) -> None:
    cost = inspect_artifact(exports["fp32"].path).cost
    assert sum(cost.operators.values()) == len(flatbuffer.read_model(exports["fp32"].path).subgraphs[0].operators)
    convolution, classifier = 8 * 8 * 8 * 3 * 9, 8 * 4
    assert cost.multiply_adds is not None
    assert cost.multiply_adds > convolution + classifier  # and the transforms
    assert cost.moved_bytes


def fields(table: flatbuffers.Table) -> Callable[[int], int]:
    """Where a table's field of a number is; 0 for one that is left out."""
    return lambda number: table.Offset(4 + 2 * number)


def text(table: flatbuffers.Table, number: int) -> str:
    return table.String(table.Pos + fields(table)(number)).decode()


def inner(table: flatbuffers.Table, number: int) -> flatbuffers.Table:
    return flatbuffers.Table(table.Bytes, table.Indirect(table.Pos + fields(table)(number)))


def item(table: flatbuffers.Table, number: int, index: int = 0) -> flatbuffers.Table:
    start = table.Vector(fields(table)(number))
    return flatbuffers.Table(table.Bytes, table.Indirect(start + 4 * index))


def floats(table: flatbuffers.Table, number: int) -> np.ndarray:
    return table.GetVectorAsNumpy(flatbuffers.number_types.Float32Flags, fields(table)(number))


def test_metadata_is_what_the_schema_says(exports: dict[str, api.Export]) -> None:
    content = metadata.entries(flatbuffer.read_model(exports["int8"].path))["TFLITE_METADATA"]
    assert content[4:8] == b"M001"
    root = flatbuffers.Table(bytearray(content), flatbuffers.encode.Get(flatbuffers.packer.uoffset, content, 0))
    assert text(root, 0) == "make"
    graph = item(root, 3)
    image, logits = item(graph, 2), item(graph, 3)
    assert text(image, 0) == "image"
    content_of_image = inner(image, 3)
    assert (
        content_of_image.Get(flatbuffers.number_types.Int8Flags, content_of_image.Pos + fields(content_of_image)(0))
        == 2
    )
    normalisation = inner(item(image, 4), 1)
    assert floats(normalisation, 0) == pytest.approx(np.array(MEAN) * 255)
    assert floats(normalisation, 1) == pytest.approx(np.array(STD) * 255)
    assert text(logits, 0) == "logits"
    assert text(item(logits, 6), 0) == "labels.txt"


def test_labels_lie_behind_the_model(exports: dict[str, api.Export]) -> None:
    with zipfile.ZipFile(exports["fp32"].path) as archive:
        assert archive.read("labels.txt").decode().split() == list(LABELS)


def test_weights_are_aligned_for_vector_loads(exports: dict[str, api.Export]) -> None:
    content = exports["fp16"].path.read_bytes()
    model = schema.Model.GetRootAs(content, 0)
    starts = [
        buffer._tab.Vector(4) for buffer in map(model.Buffers, range(model.BuffersLength())) if buffer.DataLength()
    ]
    assert starts
    assert not any(start % flatbuffer.ALIGNMENT for start in starts)


def test_values_have_the_names_of_the_nodes(
    prepared: api.Prepared, recipe: Recipe, exports: dict[str, api.Export]
) -> None:
    sample = prepared.samples["noise"][0]
    computed = {name for name, _ in LiteRTRunner.from_file(exports["fp32"].path).values(sample)}
    lowered, _ = api._specialise(prepared, find_target("litert"), recipe)
    nodes = {node.name for node in lowered.program.graph.nodes}
    assert len(computed & nodes) >= 3


def edited(source: Path, folder: Path, edit: Callable[[flatbuffer.Model], None]) -> Path:
    """A copy of a file after an edit, with the manifest beside it."""
    model = flatbuffer.read_model(source)
    edit(model)
    folder.mkdir(exist_ok=True)
    path = folder / source.name
    path.write_bytes(flatbuffer.pack(model))
    manifest = source.with_name(f"{source.name}.manifest.json")
    path.with_name(manifest.name).write_bytes(manifest.read_bytes())
    return path


def bump(dtype: str) -> Callable[[flatbuffer.Model], None]:
    """Change one number of the largest constant of a dtype."""

    def edit(model: flatbuffer.Model) -> None:
        constants = [
            tensor for tensor in model.subgraphs[0].tensors
            if flatbuffer.dtype(tensor) == dtype and flatbuffer.constant(model, tensor) is not None
        ]  # fmt: skip
        tensor = max(constants, key=lambda each: flatbuffer.constant(model, each).size)
        value = flatbuffer.constant(model, tensor).copy()
        index = np.unravel_index(np.argmax(np.abs(value)), value.shape)
        value[index] = -value[index]
        model.buffers[tensor.buffer].data = value.reshape(-1).view(np.uint8)

    return edit


@pytest.mark.parametrize(
    ("precision", "dtype", "failing"),
    [("fp16", "float16", "float16 file is the twin, rounded"), ("int8", "int8", "weights within half a step")],
)
def test_a_changed_weight_fails_the_comparison(
    prepared: api.Prepared, recipe: Recipe, exports: dict[str, api.Export], tmp_path: Path,
    precision: str, dtype: str, failing: str,
) -> None:  # fmt: skip
    path = edited(exports[precision].path, tmp_path, bump(dtype))
    lowered, _ = api._specialise(prepared, find_target("litert"), recipe)
    found = checks.run(lowered, dataclasses.replace(recipe, precision=precision), path, [prepared.samples["noise"][0]])
    assert [check.name for check in found if not check.passed] == [failing]


def test_a_custom_operator_fails_a_check(exports: dict[str, api.Export]) -> None:
    model = flatbuffer.read_model(exports["fp32"].path)
    code = model.operatorCodes[0]
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
    code.customCode = b"FlexThing"
    check = checks.builtin(model)
    assert not check.passed
    assert "FlexThing" in check.detail


def test_verification_names_what_departs(exports: dict[str, api.Export], tmp_path: Path) -> None:
    path = edited(exports["fp32"].path, tmp_path / "broken", bump("float32"))
    parity = api.verify(path)
    assert not parity.passed
    assert parity.departs
    assert "relative error" in parity.departs


@pytest.mark.parametrize("length", [0, 6, 64, 2000])
def test_a_file_cut_short_is_refused_in_one_line(exports: dict[str, api.Export], tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.tflite"
    path.write_bytes(exports["fp32"].path.read_bytes()[:length])
    for read in (inspect_artifact, LiteRTRunner.from_file):
        with pytest.raises(InputError, match=r"cut\.tflite.*(valid LiteRT|not a LiteRT model)"):
            read(path)


def test_inputs_that_do_not_fit_are_refused(exports: dict[str, api.Export]) -> None:
    runner = LiteRTRunner.from_file(exports["fp32"].path)
    with pytest.raises(InputError, match=r"takes image \(1, 3, 16, 16\)"):
        runner.run({"image": np.zeros((1, 3, 8, 8), np.float32)})
    with pytest.raises(InputError, match=r"not picture \(1, 3, 16, 16\)"):
        runner.run({"picture": np.zeros(SHAPE, np.float32)})


def test_quantisation_keeps_what_integers_can_hold(prepared: api.Prepared, exports: dict[str, api.Export]) -> None:
    full, small = (LiteRTRunner.from_file(exports[precision].path) for precision in ("fp32", "int8"))
    sample = prepared.samples["photographs"][0]
    difference = relative_l2(small.run(sample)["logits"], full.run(sample)["logits"])
    assert 1e-5 < difference < ROUNDING["int8"]
