"""What an app needs beside the graph, as Android's and MediaPipe's tools read it: TFLite Metadata, schema 1.1.0.

The schema is `metadata_schema.fbs` of tensorflow/tflite-support. No package with a reader or writer for it is
maintained, and of its tables few are of use here, so these are written field by field.
"""

import io
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from mobilemix.targets.base import Lowered
from mobilemix.targets.litert import flatbuffer
from mobilemix.targets.litert.flatbuffer import Model

ENTRY = "TFLITE_METADATA"
IDENTIFIER = b"M001"
PARSER_VERSION = "1.0.0"
LABELS = "labels.txt"

# Values of the schema's enumerations, and types of its unions.
_AXIS_LABELS = 2
_RGB, _GRAYSCALE = 1, 2
_FEATURE, _IMAGE = 1, 2
_NORMALISATION = 1

Table = Mapping[int, Any]
"""Fields by their number in the schema: text, a byte (np.int8), an unsigned integer (np.uint32), a table, or a list."""


def describe(model: Model, lowered: Lowered) -> None:
    """Write the metadata into a model: as TFLite Metadata, and ours, such as the provenance, under its own names."""
    model.description = lowered.metadata.get("description", lowered.name).encode()
    for name, content in {
        **{name: text.encode() for name, text in lowered.metadata.items()},
        ENTRY: _encode(_model(lowered, model)),
    }.items():
        model.metadata.append(schema.MetadataT(name=name.encode(), buffer=len(model.buffers)))
        model.buffers.append(schema.BufferT(data=np.frombuffer(content, np.uint8)))


def entries(model: Model) -> dict[str, bytes]:
    """The metadata of a model by name."""
    found = {}
    for each in model.metadata or []:
        data = model.buffers[each.buffer].data
        found[flatbuffer.text(each.name)] = b"" if data is None else np.asarray(data, np.uint8).tobytes()
    return found


def with_labels(content: bytes, labels: Sequence[str] | None) -> bytes:
    """A file's content with the class names behind it, one a line, in the archive that the metadata names."""
    if labels is None:
        return content
    stream = io.BytesIO(content)
    with zipfile.ZipFile(stream, "a") as archive:
        # A fixed time, so that the same model gives the same bytes.
        archive.writestr(zipfile.ZipInfo(LABELS, (1980, 1, 1, 0, 0, 0)), "".join(f"{label}\n" for label in labels))
    return stream.getvalue()


def _model(lowered: Lowered, model: Model) -> Table:
    described = {0: lowered.name, 1: lowered.metadata.get("description"), 2: lowered.metadata.get("version")}
    described |= {4: lowered.metadata.get("author"), 5: lowered.metadata.get("license"), 7: PARSER_VERSION}
    (signature,) = model.signatureDefs
    graph = {
        2: [
            _input(lowered, name, flatbuffer.shape(model.subgraphs[0].tensors[index]))
            for name, index in _order(signature.inputs, model.subgraphs[0].inputs)
        ],
        3: [_output(lowered, name) for name, _ in _order(signature.outputs, model.subgraphs[0].outputs)],
    }
    return described | {3: [graph]}


def _order(named: Sequence[Any], indices: Sequence[int]) -> list[tuple[str, int]]:
    """Names of tensors in the order of the graph, which the schema wants."""
    names = {each.tensorIndex: flatbuffer.text(each.name) for each in named}
    return [(names[index], index) for index in map(int, indices)]


def _input(lowered: Lowered, name: str, shape: tuple[int, ...]) -> Table:
    if lowered.mean is None or lowered.std is None or name != lowered.input_names[0]:
        return {0: name, 3: {0: np.int8(_FEATURE), 1: {}}}
    colours = np.int8(_GRAYSCALE if len(lowered.mean) == 1 else _RGB)
    height, width = shape[-2:]
    size = {0: np.uint32(width), 1: np.uint32(height)}
    # The schema's pixels are 0 to 255.
    mean, std = (np.array(values, np.float32) * np.float32(255) for values in (lowered.mean, lowered.std))
    return {
        0: name,
        1: "normalised pixels, (batch, channels, height, width)",
        3: {0: np.int8(_IMAGE), 1: {0: colours, 1: size}},
        4: [{0: np.int8(_NORMALISATION), 1: {0: mean, 1: std}}],
    }


def _output(lowered: Lowered, name: str) -> Table:
    feature = {0: name, 3: {0: np.int8(_FEATURE), 1: {}}}
    if lowered.labels is None or name != lowered.output_names[0]:
        return feature
    labels = {0: LABELS, 1: "class names, one a line", 2: np.int8(_AXIS_LABELS)}
    return feature | {1: "logits; softmax gives probabilities", 6: [labels]}


def _encode(table: Table) -> bytes:
    builder = flatbuffers.Builder(1024)
    builder.Finish(_table(builder, table), file_identifier=IDENTIFIER)
    return bytes(builder.Output())


def _table(builder: flatbuffers.Builder, table: Table) -> int:
    fields = {number: value for number, value in table.items() if value is not None}
    # What lies outside a table is written before it.
    places = {
        number: _place(builder, value)
        for number, value in fields.items()
        if not np.isscalar(value) or isinstance(value, str)
    }
    builder.StartObject(max(fields, default=-1) + 1)
    for number, value in fields.items():
        if number in places:
            builder.PrependUOffsetTRelativeSlot(number, places[number], 0)
        elif isinstance(value, np.int8):
            builder.PrependInt8Slot(number, int(value), 0)
        else:
            builder.PrependUint32Slot(number, int(value), 0)
    offset: int = builder.EndObject()
    return offset


def _place(builder: flatbuffers.Builder, value: Any) -> int:
    offset: int
    if isinstance(value, str):
        offset = builder.CreateString(value)
    elif isinstance(value, np.ndarray):
        offset = builder.CreateNumpyVector(value)
    elif isinstance(value, Mapping):
        offset = _table(builder, value)
    else:
        places = [_place(builder, item) for item in value]
        builder.StartVector(4, len(places), 4)
        for place in reversed(places):
            builder.PrependUOffsetTRelative(place)
        offset = builder.EndVector()
    return offset
