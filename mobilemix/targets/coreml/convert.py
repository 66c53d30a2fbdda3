"""Lowered program → Core ML package, through coremltools' torch.export front end.

The package's bytes depend on the program, its weights, the options and the versions of torch and coremltools alone:
the date and the debug file that coremltools adds are left out, protobuf maps are written in order, and the
identifiers in `Manifest.json`, which coremltools draws at random, are derived from the content.
"""

import contextlib
import dataclasses
import functools
import io
import json
import operator
import re
import shutil
import sys
import tempfile
import traceback
import uuid
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import coremltools as ct
import numpy as np
import torch
from coremltools.converters import _converters_entry
from coremltools.converters.mil.mil import Block, Program, types
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument

from mobilemix.errors import InputError, MobilemixError, TargetError, UnsupportedOpError
from mobilemix.files import sha256
from mobilemix.passes.base import source
from mobilemix.passes.editing import WIDE
from mobilemix.recipe import Recipe
from mobilemix.signature import inputs_of, outputs_of
from mobilemix.targets.base import Lowered
from mobilemix.targets.coreml import frontend  # noqa: F401, it registers readers
from mobilemix.targets.coreml.interface import distinct_outputs, plain_flags, take_unscaled
from mobilemix.targets.coreml.mil_passes import PROBABILITIES, pass_pipeline

STORED_DTYPES = {"int64": "int32", "bool": "int32", "float64": "float32"}
"""Core ML's arrays are float32 and int32."""

LABEL_OUTPUT = "classLabel"
"""Output of a classifier package: the best class. Core ML adds `classLabel_probs`, a dictionary of all classes."""

NORMALISATION_KEY = "mobilemix.normalisation"
"""User-defined metadata of an image package: JSON with the `mean` and `std` that are folded into it."""

_CHANNEL_LAYOUTS = {1: ct.colorlayout.GRAYSCALE, 3: ct.colorlayout.RGB}
_SPECIFICATION_PATH = Path("Data/com.apple.CoreML/model.mlmodel")
_WEIGHTS_PATH = Path("Data/com.apple.CoreML/weights")
_WHOLE = frozenset(
    f"aten::{name}"
    for name in (
        *("adaptive_avg_pool2d", "batch_norm", "chunk", "conv1d", "conv2d", "group_norm", "layer_norm", "linear"),
        *("matmul", "max_pool2d", "reshape", "softmax", "square"),
    )
)
"""Composite operators that coremltools converts as they are."""

_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "https://developer.apple.com/documentation/coreml")


def convert(lowered: Lowered, recipe: Recipe, destination: Path) -> None:
    """Compile `lowered` and write the package to `destination`, a path ending in .mlpackage that does not exist.

    An image input takes RGB (or grey) pixels and normalises them; everything else is float32 outside, whatever the
    precision inside. With labels the package is a classifier: `classLabel` and `classLabel_probs` come from a softmax
    (which Core ML does not add by itself, and without which Vision's confidences would not be probabilities), and the
    model's own outputs stay beside them. A batch of several images cannot be a classifier and has the plain outputs.

    Raises:
        InputError: an image input for a model that takes none, or labels that do not fit the first output.
        UnsupportedOpError: an operator that coremltools does not have.
        TargetError: any other refusal by coremltools.
    """
    program = lowered.program
    shapes = [_shape(program, name) for name in program.graph_signature.user_inputs]
    if recipe.input == "image":
        inputs = [_image_input(lowered, shapes)]
    else:
        inputs = [
            ct.TensorType(name=name, shape=each.shape, dtype=_stored(each.dtype))
            for name, each in zip(lowered.input_names, inputs_of(program), strict=True)
        ]
    classifier = _classifier(lowered, program)
    precision = ct.precision.FLOAT32 if recipe.precision == "fp32" else ct.transform.FP16ComputePrecision(_is_narrow)
    with (
        tempfile.TemporaryDirectory() as folder,  # elsewhere: a full destination is then our own write that fails
        _one_line_errors(program),
        quiet(),
        unhindered(),
    ):
        model = ct.convert(
            _decomposed(program, lowered.std if recipe.input == "image" else None),
            inputs=inputs,
            outputs=[
                ct.TensorType(name=name, dtype=_stored(dtype))
                for name, (_, dtype) in zip(lowered.output_names, outputs_of(program), strict=True)
            ],
            classifier_config=classifier,
            minimum_deployment_target=ct.target[f"iOS{recipe.minimum_ios}"],
            compute_precision=precision,
            pass_pipeline=pass_pipeline(classifier is not None),
            skip_model_load=True,
            package_dir=str(Path(folder, "model.mlpackage")),
        )
        specification = model.get_spec()
        _describe(specification, lowered, recipe)
        write_package(specification, Path(model.weights_dir), destination)


def _is_narrow(operation: Any) -> bool:
    """Whether an operation of coremltools' program computes in float16 in an fp16 package."""
    return not operation.name.startswith(WIDE)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep coremltools' progress bars and warnings off the terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def unhindered() -> Iterator[None]:
    """Let coremltools run its passes without what it does besides, which takes two thirds of a conversion's time.

    Checking the whole program after each pass: what that could find does not get past executing the saved package.
    Annotating it: the reach of compressed weights is nothing in a float program, and where an operation comes from is
    known by its name. Printing it for a log that nobody reads. Describing one type thousands of times, and collecting
    the garbage of the whole process.
    """
    nothing = lambda *_arguments, **_options: None  # noqa: E731
    described = functools.cache(types.get_type_info)
    with contextlib.ExitStack() as replaced:
        for owner, name, other in (
            (Program, "validate", nothing),
            (Program, "__str__", lambda _: ""),
            (Block, "_propagate_nonreplaceable_vars", nothing),
            (Block, "_copy_scope_info", staticmethod(nothing)),
            (_converters_entry, "gc", SimpleNamespace(collect=nothing)),
            *((module, "get_type_info", described) for module in _DESCRIBING),
        ):
            replaced.enter_context(mock.patch.object(owner, name, other))
        yield


_DESCRIBING = [
    module
    for name, module in sys.modules.items()
    if name.startswith("coremltools.") and getattr(module, "get_type_info", None) is types.get_type_info
]


class _InAten(ExportedProgram):
    """A program that needs no decomposition, in the dialect that coremltools asks for.

    `run_decompositions` would set it, too, at the price of retracing the whole program.
    """

    dialect = "ATEN"


@functools.lru_cache(maxsize=1)
def _decomposed(program: ExportedProgram, std: tuple[float, ...] | None) -> ExportedProgram:
    """In the dialect that coremltools reads; kept because verification converts the same program in float32."""
    if std is not None:
        program = take_unscaled(program, std)
    program = distinct_outputs(plain_flags(program))
    if all(map(_is_read_as_it_is, program.graph.nodes)):
        whole = _InAten.__new__(_InAten)
        whole.__dict__.update(program.__dict__)
        return whole
    decomposed: ExportedProgram = program.run_decompositions({})
    _restore_names(decomposed)
    return decomposed


def _is_read_as_it_is(node: fx.Node) -> bool:
    """Whether coremltools reads a call as `torch.export` captures it, and not only what decompositions leave of it."""
    if node.op != "call_function" or node.target is operator.getitem:
        return True
    assert isinstance(node.target, torch._ops.OpOverload)
    composite = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return not node.target._schema.is_mutable and (not composite or node.target._schema.name in _WHOLE)


def _restore_names(decomposed: ExportedProgram) -> None:
    """Name the nodes as before `run_decompositions` numbered them anew; the bisect and messages go by names.

    Where one node became several, the last has its name; the others carry it in front of their own.
    """
    calls = [node for node in decomposed.graph.nodes if node.op == "call_function" and node.meta.get("from_node")]
    origins = {node: node.meta["from_node"][-1].name for node in calls}
    last = {origin: node for node, origin in origins.items() if node.target is not operator.getitem}
    renamed = {
        node.name: origin if last.get(origin) is node else f"{origin}__{node.name}" for node, origin in origins.items()
    }
    for node in origins:
        node.name = renamed[node.name]
    specs = decomposed.graph_signature.output_specs
    specs[:] = [
        dataclasses.replace(spec, arg=TensorArgument(renamed.get(spec.arg.name, spec.arg.name))) for spec in specs
    ]


def _image_input(lowered: Lowered, shapes: list[tuple[int, ...]]) -> ct.ImageType:
    """The image input that computes pixel / 255 − mean, in float32 even in an fp16 program (one rounding, after it)."""
    if lowered.mean is None or lowered.std is None:
        raise InputError(f"{lowered.name} has no mean and std for an image input; use --input tensor")
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][0] != 1 or shapes[0][1] not in _CHANNEL_LAYOUTS:
        found = " and ".join("x".join(map(str, shape)) for shape in shapes)
        raise InputError(f"an image input is 1x3xHxW or 1x1xHxW, not {found}; use --input tensor")
    channels = shapes[0][1]
    if len(lowered.mean) != channels or len(lowered.std) != channels:
        raise InputError(f"mean and std have {len(lowered.mean)} channels, the input {channels}; use --input tensor")
    bias = [-value for value in lowered.mean]
    return ct.ImageType(
        name=lowered.input_names[0],
        shape=shapes[0],
        color_layout=_CHANNEL_LAYOUTS[channels],
        scale=1 / 255,
        bias=bias if channels > 1 else bias[0],
    )


def _classifier(lowered: Lowered, program: ExportedProgram) -> ct.ClassifierConfig | None:
    if lowered.labels is None:
        return None
    logits = _shape(program, str(program.graph_signature.user_outputs[0]))
    if logits[-1] != len(lowered.labels):
        raise InputError(f"there are {len(lowered.labels)} labels for {logits[-1]} outputs; give one name a class")
    repeated = [label for label, count in Counter(lowered.labels).items() if count > 1]
    if repeated:
        raise InputError(f"label '{repeated[0]}' occurs more than once; Core ML needs distinct class names")
    if logits != (1, len(lowered.labels)):
        return None
    return ct.ClassifierConfig(
        list(lowered.labels), predicted_feature_name=LABEL_OUTPUT, predicted_probabilities_output=PROBABILITIES
    )


def _stored(dtype: str) -> type[np.generic]:
    return np.dtype(STORED_DTYPES.get(dtype, dtype)).type


def _shape(program: ExportedProgram, name: str) -> tuple[int, ...]:
    (node,) = (node for node in program.graph.nodes if node.name == name)
    return tuple(node.meta["val"].shape)


def _describe(specification: Any, lowered: Lowered, recipe: Recipe) -> None:
    """Fill in the metadata that Xcode shows, and what `Runner` needs to feed the package."""
    details = dict(lowered.metadata)
    metadata = specification.description.metadata
    metadata.author = details.pop("author", "")
    metadata.license = details.pop("license", "")
    metadata.versionString = details.pop("version", "")
    metadata.shortDescription = details.pop("description", lowered.name)
    metadata.userDefined.pop("com.github.apple.coremltools.conversion_date", None)
    metadata.userDefined.update(details)
    if recipe.input == "image":
        normalisation = {"mean": lowered.mean, "std": lowered.std}
        metadata.userDefined[NORMALISATION_KEY] = json.dumps(normalisation)
    for feature in specification.description.input:
        feature.shortDescription = (
            "Pixels; the package normalises them" if recipe.input == "image" else "Normalised float32 tensor"
        )
    for feature in specification.description.output:
        feature.shortDescription = {
            LABEL_OUTPUT: "The most probable class",
            f"{LABEL_OUTPUT}_probs": "Probability of every class",
        }.get(feature.name, "Output of the model, before any softmax" if lowered.labels else "Output of the model")


def write_package(specification: Any, weights: Path, destination: Path) -> None:
    """Lay out a package as Xcode does: the specification, the weights and a manifest with identifiers for both."""
    file = destination / _SPECIFICATION_PATH
    file.parent.mkdir(parents=True)
    file.write_bytes(_serialised(specification))
    (destination / _WEIGHTS_PATH).mkdir()
    for stored in weights.iterdir():  # not copytree, whose errors are lists
        shutil.copyfile(stored, destination / _WEIGHTS_PATH / stored.name)
    items = {
        _SPECIFICATION_PATH: ("model.mlmodel", "CoreML Model Specification"),
        _WEIGHTS_PATH: ("weights", "CoreML Model Weights"),
    }
    identifiers = {path: str(uuid.uuid5(_NAMESPACE, f"{path} {sha256(destination / path)}")) for path in items}
    manifest = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": {
            identifiers[path]: {
                "author": "com.apple.CoreML",
                "description": description,
                "name": name,
                "path": path.relative_to("Data").as_posix(),
            }
            for path, (name, description) in items.items()
        },
        "rootModelIdentifier": identifiers[_SPECIFICATION_PATH],
    }
    (destination / "Manifest.json").write_text(json.dumps(manifest, indent=4), encoding="utf-8")


def _serialised(specification: Any) -> bytes:
    data: bytes = specification.SerializeToString(deterministic=True)
    return data


@contextlib.contextmanager
def _one_line_errors(program: ExportedProgram) -> Iterator[None]:
    """Turn whatever coremltools raises into one line that names the operator and the user's line of source.

    coremltools reports the place in its log only, so it is read from the frames of its converter.
    """
    try:
        yield
    except (OSError, MobilemixError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        nodes = {node.name: node for node in program.graph.nodes}
        for frame, _ in traceback.walk_tb(error.__traceback__):
            values = frame.f_locals
            match frame.f_code.co_name:
                case "from_exir_node":
                    message = f"Core ML has no operator {values.get('kind')}: {source(values['node'])}"
                    raise UnsupportedOpError(message) from error
                case "convert_single_node":
                    node = values["node"]
                    place = source(nodes[node.name]) if node.name in nodes else f"node {node.name}"
                    raise TargetError(f"Core ML refuses {node.kind}: {place}: {reason}") from error
                case "apply_pipeline" if "pass_name" in values:
                    raise TargetError(f"coremltools' pass {values['pass_name']} failed: {reason}") from error
        layer = re.search(r'Layer "(\w+?)(_cast_fp16)?"', reason)
        if layer and layer[1] in nodes:
            raise TargetError(f"Core ML refuses {source(nodes[layer[1]])}: {reason}") from error
        raise TargetError(f"coremltools failed: {reason}") from error
