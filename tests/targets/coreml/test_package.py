import json
import shutil
from collections.abc import Callable
from pathlib import Path

import coremltools as ct
import numpy as np
import pytest
import torch
from coreml_packages import Tiny, converted, saved, seeded
from coremltools.libmilstoragepython import _BlobStorageWriter
from coremltools.proto import MIL_pb2, Model_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilemix.errors import InputError
from mobilemix.targets.coreml.package import (
    ALIGNMENT,
    DTYPES,
    RECORD,
    Constant,
    Package,
    ValueType,
    _Reader,
    read_package,
)

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
IMAGE = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def module() -> Tiny:
    return seeded(Tiny())


@pytest.fixture(scope="module")
def original(module: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(converted(module, (IMAGE,)), tmp_path_factory.mktemp("packages") / "tiny.mlpackage")


@pytest.fixture
def package(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "tiny.mlpackage"))


def edit(package: Path, change: Callable[[Model_pb2.Model], object]) -> None:
    spec = Model_pb2.Model.FromString((package / MODEL).read_bytes())
    change(spec)
    (package / MODEL).write_bytes(spec.SerializeToString())


def operations(spec: Model_pb2.Model) -> list[MIL_pb2.Operation]:
    main = spec.mlProgram.functions["main"]
    return main.block_specializations[main.opset].operations


def constants(package: Package) -> dict[str, Constant]:
    return {each.outputs[0].name: each.attributes["val"] for each in package.operations if each.type == "const"}


def test_reads_what_was_saved(original: Path, module: Tiny) -> None:
    package = read_package(original)
    assert package.opset == "CoreML6"
    assert list(package.inputs.values()) == [ValueType("fp32", (1, 3, 16, 16))]
    assert package.labels is None
    assert package.operations[-1].outputs[0].name == package.outputs[0]
    weight = next(value for name, value in constants(package).items() if "head_weight" in name)
    assert (weight.dtype, weight.shape) == ("fp32", (5, 32))
    np.testing.assert_array_equal(weight.array, module.head.weight.detach())
    assert weight.file_offset is not None
    with pytest.raises(ValueError, match="read-only"):
        weight.array[0] = 0


def test_every_spelling_of_a_constant(original: Path) -> None:
    dtypes = {value.dtype for value in constants(read_package(original)).values()}
    assert dtypes == {"fp32", "int32", "bool", "string"}


def test_classifier_of_images(module: Tiny, tmp_path: Path) -> None:
    model = converted(
        module,
        (IMAGE,),
        inputs=[ct.ImageType(name="photo", shape=IMAGE.shape, color_layout="BGR")],
        classifier_config=ct.ClassifierConfig(["a", "b", "c", "d", "e"]),
    )
    package = read_package(saved(model, tmp_path / "c.mlpackage"))
    assert package.inputs == {"photo": ValueType("fp32", (1, 3, 16, 16), "BGR")}
    assert package.labels == ("a", "b", "c", "d", "e")


SPECIMENS = {
    "FLOAT32": ("write_float_data", np.float32([0.5, -2, 3, 7, -0.0])),
    "INT32": ("write_int32_data", np.int32([1, -2, 2**31 - 1])),
    "UINT32": ("write_uint32_data", np.uint32([1, 2**32 - 1])),
    "INT16": ("write_int16_data", np.int16([1, -2, 3])),
    "UINT16": ("write_uint16_data", np.uint16([1, 65535])),
    "INT8": ("write_int8_data", np.int8([1, -128, 127])),
    "UINT8": ("write_uint8_data", np.uint8([1, 255])),
    "INT4": ("write_int4_data", np.int8([7, -8, -1, 0, 3])),
    "UINT1": ("write_uint1_data", np.uint8([1, 0, 0, 1, 1, 1, 0, 1, 1, 0, 1])),
    "UINT2": ("write_uint2_data", np.uint8([3, 0, 2, 1, 3])),
    "UINT3": ("write_uint3_data", np.uint8([7, 0, 5, 2, 6, 1, 3, 4, 7])),
    "UINT4": ("write_uint4_data", np.uint8([15, 0, 9])),
    "UINT6": ("write_uint6_data", np.uint8([63, 0, 33, 7, 21])),
}


@pytest.mark.parametrize("name", [*SPECIMENS, "FLOAT16"])
def test_reads_every_type_that_the_writer_writes(name: str, tmp_path: Path) -> None:
    method, values = SPECIMENS.get(name, ("write_fp16_data", np.float16([0.5, -2, 6e-8, 65504, np.inf])))
    writer = _BlobStorageWriter(str(tmp_path / "weight.bin"))
    writer.write_uint8_data(np.uint8([9, 9, 9]))
    offset = getattr(writer, method)(values.view(np.uint16) if name == "FLOAT16" else values)
    del writer
    value = MIL_pb2.Value()
    value.type.tensorType.dataType = MIL_pb2.DataType.Value(name)
    value.type.tensorType.rank = 1
    value.type.tensorType.dimensions.add().constant.size = values.size
    value.blobFileValue.fileName = "@model_path/weight.bin"
    value.blobFileValue.offset = offset
    constant = _Reader(tmp_path).constant(value, "specimen")
    assert constant.array.dtype == values.dtype
    np.testing.assert_array_equal(constant.array, values)


def test_refuses_what_is_no_package(tmp_path: Path) -> None:
    (tmp_path / "file.mlpackage").write_bytes(b"PK")
    for name in ("file.mlpackage", "absent.mlpackage"):
        with pytest.raises(InputError, match=r"Manifest\.json"):
            read_package(tmp_path / name)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"rootModelIdentifier": "x", "itemInfoEntries": []}']
)
def test_bad_manifest(package: Path, content: bytes) -> None:
    (package / "Manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"no readable Manifest\.json"):
        read_package(package)


def test_manifest_that_leads_outside(package: Path) -> None:
    manifest = json.loads((package / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../../etc/passwd"
    (package / "Manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="out of the package"):
        read_package(package)


def test_missing_parts(package: Path) -> None:
    (package / WEIGHTS).rename(package / "elsewhere")
    with pytest.raises(InputError, match="weight file"):
        read_package(package)
    (package / MODEL).unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_package(package)


@pytest.mark.parametrize("kept", [0, 1, ALIGNMENT, ALIGNMENT + 40, 2 * ALIGNMENT, -1])
def test_truncated_weight_file(package: Path, kept: int) -> None:
    content = (package / WEIGHTS).read_bytes()
    (package / WEIGHTS).write_bytes(content[:kept])
    with pytest.raises(InputError, match="weight file"):
        read_package(package)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 0xDEADBEEE, "does not begin with 0xdeadbeef"),
        (1, 1, "stores type 1, the program declares fp32"),
        (2, 1, "1 bytes are stored"),
        (3, 2**63, "outside a weight file"),
        (3, 129, "outside a weight file"),
        (4, 3, "bytes are stored"),
    ],
)
def test_bad_record(package: Path, position: int, value: int, message: str) -> None:
    content = bytearray((package / WEIGHTS).read_bytes())
    fields = list(RECORD.unpack_from(content, ALIGNMENT))
    fields[position] = value
    RECORD.pack_into(content, ALIGNMENT, *fields)
    (package / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_package(package)


@pytest.mark.parametrize("offset", [2**40, 2**64 - 64, 65, 128])
def test_offset_that_is_no_record(package: Path, offset: int) -> None:
    def change(spec: Model_pb2.Model) -> None:
        stored = next(
            each.attributes["val"]
            for each in operations(spec)
            if each.type == "const" and each.attributes["val"].WhichOneof("value") == "blobFileValue"
        )
        stored.blobFileValue.offset = offset

    edit(package, change)
    with pytest.raises(InputError, match="no record of|does not begin with"):
        read_package(package)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "@model_path/../../../x", "weights/weight.bin", "@model_path//etc/passwd"]
)
def test_weight_path_that_leads_outside(package: Path, name: str) -> None:
    def change(spec: Model_pb2.Model) -> None:
        for each in operations(spec):
            if each.attributes["val"].WhichOneof("value") == "blobFileValue":
                each.attributes["val"].blobFileValue.fileName = name

    edit(package, change)
    with pytest.raises(InputError, match="out of the package|not below"):
        read_package(package)


def _drop_main(spec: Model_pb2.Model) -> None:
    spec.mlProgram.functions["other"].CopyFrom(spec.mlProgram.functions["main"])
    del spec.mlProgram.functions["main"]


def _first(spec: Model_pb2.Model, kind: str) -> MIL_pb2.Operation:
    return next(each for each in operations(spec) if each.type == kind)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop_main, "no function 'main'; it has: other"),
        (lambda spec: spec.mlProgram.functions.clear(), "it has: none"),
        (lambda spec: spec.neuralNetwork.SetInParent(), "no ML Program"),
        (lambda spec: setattr(spec.mlProgram.functions["main"], "opset", "CoreML99"), "no block .* 'CoreML99'"),
        (lambda spec: operations(spec).pop(0), "which nothing before it defines"),
        (lambda spec: operations(spec).append(operations(spec)[0]), "defined twice"),
        (lambda spec: setattr(operations(spec)[0].outputs[0], "name", "a\nb"), "nothing before it|unprintable"),
        (lambda spec: operations(spec).pop(), "no operation computes the output"),
        (lambda spec: _first(spec, "conv").inputs["x"].ClearField("arguments"), "nothing is bound"),
        (
            lambda spec: setattr(_first(spec, "conv").outputs[0].type.tensorType, "dataType", MIL_pb2.BFLOAT16),
            "unknown data type 13",
        ),
        (lambda spec: setattr(_first(spec, "conv").outputs[0].type.tensorType, "rank", 3), "rank 3 and 4 sizes"),
        (lambda spec: _first(spec, "const").attributes.pop("val"), "has no value"),
        (
            lambda spec: setattr(_first(spec, "const").outputs[0].type.tensorType, "dataType", MIL_pb2.FLOAT16),
            "is declared fp16",
        ),
        (
            lambda spec: _first(spec, "const").attributes["val"].immediateValue.tensor.floats.values.append(1),
            "floats given for string|values for a shape",
        ),
    ],
)
def test_malformed_program(package: Path, change: Callable[[Model_pb2.Model], object], message: str) -> None:
    edit(package, change)
    with pytest.raises(InputError, match=message):
        read_package(package)


@settings(deadline=None, max_examples=100)
@given(content=st.binary(max_size=200))
def test_random_bytes_as_model(original: Path, tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("random")
    shutil.copy(original / "Manifest.json", folder)
    (folder / MODEL).parent.mkdir(parents=True)
    (folder / MODEL).write_bytes(content)
    with pytest.raises(InputError):
        read_package(folder)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_damaged_model_is_read_or_refused(original: Path, tmp_path_factory: pytest.TempPathFactory, data) -> None:
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("damaged") / "p"))
    content = bytearray((folder / MODEL).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (folder / MODEL).write_bytes(content)
    try:
        package = read_package(folder)
        for constant in constants(package).values():
            assert constant.array.shape == constant.shape
    except InputError:
        pass


def test_every_type_of_the_format_is_known_or_refused() -> None:
    unknown = {name for name, code in MIL_pb2.DataType.items() if code not in DTYPES}
    assert unknown == {"UNUSED_TYPE", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2"}
