"""Lowered program → checked ONNX file: translate, rewrite, tidy with onnxsim, name, describe, check, write."""

import contextlib
import dataclasses
import io
import json
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir
import onnxsim
from onnx_ir.passes import common

import mobilemix
from mobilemix.errors import InputError, TargetError, first_line
from mobilemix.parity import noise, relative_l2
from mobilemix.recipe import Recipe, opset_of
from mobilemix.signature import inputs_of
from mobilemix.targets.base import Inputs, Lowered
from mobilemix.targets.onnx.batch import generalise, places_of
from mobilemix.targets.onnx.half import halve
from mobilemix.targets.onnx.rewrites import PASSES, Step, rewrite
from mobilemix.targets.onnx.runtime import read_model, trace
from mobilemix.targets.onnx.translate import translate

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Larger models keep their weights in a file beside them: protobuf stops at 2^31 bytes, readers' copies before that."""

TIDY_TOLERANCE = 1e-5
"""Largest relative L2 change of an output that onnxsim may cause, by rounding folded constants."""

# The oldest file version that has the operators, because runtimes on phones refuse newer ones than they know.
_IR_VERSIONS = {18: 8, 19: 9, 20: 9, 21: 10, 22: 10}
_HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


def write(lowered: Lowered, recipe: Recipe, destination: Path, steps: Sequence[Step] = PASSES) -> None:
    """Write `lowered` as an ONNX file, with `destination.stem`.data beside it where it is large.

    The same program, recipe and `steps`, the rewrites for whoever runs the file, give the same bytes.

    Raises:
        UnsupportedOpError: an operator that ONNX has none for.
        InputError: an opset before the precision's.
        TargetError: torch.onnx, onnxsim or the checker refused the graph, or onnxsim changed what it computes.
        BatchError: the batch is to be left open, and cannot be.
    """
    with tempfile.TemporaryDirectory(dir=destination.parent) as folder:
        draft, tidied, final = (Path(folder, stage, destination.name) for stage in ("draft", "tidied", "final"))
        modules = _simplify(lowered, recipe, steps, draft, tidied)
        (sample,) = noise(inputs_of(lowered.program), 1)
        misnamed = _compare(draft, tidied, dict(zip(lowered.input_names, sample.values(), strict=True)))
        model = ir.load(tidied)
        if lowered.larger is not None:
            larger = dataclasses.replace(lowered, program=lowered.larger)
            draft, tidied = (Path(folder, f"larger {stage}", destination.name) for stage in ("draft", "tidied"))
            _simplify(larger, recipe, steps, draft, tidied)
            generalise(model, ir.load(tidied), places_of(lowered))
        _name_constants(model)
        _rename(model, misnamed)
        if recipe.precision in _HALVES:
            halve(model, _HALVES[recipe.precision])
        _finish(model, modules, lowered, opset_of(recipe))
        save(model, final)
        check(final)
        for file in sorted(final.parent.iterdir(), key=lambda file: file == final):  # the model after its weights
            file.replace(destination.with_name(file.name))


def write_changed(
    lowered: Lowered, recipe: Recipe, destination: Path, steps: Sequence[Step], change: Callable[[Path, Path], None]
) -> None:
    """Write what becomes of the float32 file of the recipe's opset; raises as `write` and `change` do.

    Args:
        lowered, recipe, destination, steps: as of `write`.
        change: reads the first file and writes the second.
    """
    with tempfile.TemporaryDirectory(dir=destination.parent) as folder:
        full, final = (Path(folder, stage, destination.name) for stage in ("full", "final"))
        for path in (full, final):
            path.parent.mkdir()
        write(lowered, float_recipe(recipe), full, steps)
        change(full, final)
        check(final)
        final.replace(destination)


def float_recipe(recipe: Recipe) -> Recipe:
    """Of the float32 file that the recipe's is made from."""
    return dataclasses.replace(recipe, precision="fp32", opset=opset_of(recipe))


def _simplify(lowered: Lowered, recipe: Recipe, steps: Sequence[Step], draft: Path, tidied: Path) -> Mapping[str, str]:
    """Write the graph as the rewrites leave it, and tidied; returns the modules that its values are from."""
    translation = translate(lowered, opset_of(recipe))
    rewrite(translation.model, steps)
    save(translation.model, draft)
    _tidy(draft, tidied)
    return translation.modules


def save(model: ir.Model, path: Path) -> None:
    """Write the model to a folder of its own, with the weights in `path.stem`.data if it is large."""
    path.parent.mkdir()
    large = sum(value.const_value.nbytes for value in model.graph.initializers.values()) > EXTERNAL_DATA_BYTES
    ir.save(model, path, external_data=f"{path.stem}.data" if large else None)


def _tidy(source: Path, destination: Path) -> None:
    """Let onnxsim fold, fuse and remove what our rewrites left."""
    destination.parent.mkdir()
    try:
        # It prints on its way; certification would depend on what else is installed, and records itself in the file.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            onnxsim.simplify(
                str(source),
                output_path=str(destination),
                certify=False,
                import_custom_schemas=False,
                inline_functions=False,
            )
    except Exception as error:
        raise TargetError(f"onnxsim cannot simplify the graph: {first_line(error)}") from error


def _compare(before: Path, after: Path, sample: Inputs) -> set[str]:
    """Compare on noise, because what onnxsim does to a graph is nobody's promise; where it did nothing, that is proof.

    Returns:
        Names of values that mean something else now, as a convolution into which a product was folded does.

    Raises:
        TargetError: an output changed, or ONNX Runtime cannot load one of the two.
    """
    if _content(before) == _content(after) is not None:
        return set()
    try:
        (expected, meant), (outputs, values) = (trace(path, sample) for path in (before, after))
    except InputError as error:
        raise TargetError(str(error)) from error
    for name, value in expected.items():
        if not (change := relative_l2(outputs[name], value)) <= TIDY_TOLERANCE:
            raise TargetError(
                f"onnxsim changed output '{name}' by {change:.1e}, more than rounding ({TIDY_TOLERANCE:.0e})"
            )
    return {
        name
        for name, value in values.items()
        if name in meant and (value.shape != meant[name].shape or relative_l2(value, meant[name]) > TIDY_TOLERANCE)
    }


def _name_constants(model: ir.Model) -> None:
    """Let no constant's name end in a digit.

    ONNX Runtime's quantiser gives each reader of a bias a copy and numbers these: the copies of val_19 are val_191,
    val_192, and so on, whether or not a node computes a value of that name.
    """
    for value in list(model.graph.initializers.values()):
        if str(value.name)[-1].isdigit():
            value.name = f"{value.name}.constant"


def _rename(model: ir.Model, misnamed: Collection[str]) -> None:
    """Give values that mean something else than they did another name."""
    for node in model.graph:
        for value in node.outputs:
            if value.name in misnamed:
                value.name = f"{value.name}.folded"


def _content(path: Path) -> object:
    """All that the outputs of a model depend on, to be compared; None if weights lie in another file beside it."""
    if len(list(path.parent.iterdir())) > 1:
        return None
    model = read_model(path)
    graph = model.graph
    opsets = {each.domain: each.version for each in model.opset_import}
    nodes = {
        tuple(node.output): (node.domain, node.op_type, list(node.input), {each.name: each for each in node.attribute})
        for node in graph.node
    }
    weights = {tensor.name: tensor for tensor in graph.initializer}
    inputs, outputs = ({value.name: value.type for value in values} for values in (graph.input, graph.output))
    return opsets, nodes, weights, inputs, outputs, list(model.functions)


def _finish(model: ir.Model, modules: Mapping[str, str], lowered: Lowered, opset: int) -> None:
    """Say what the model is and where each node comes from, and nothing about the machine that made it."""
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()  # onnxsim's log
    model.graph.metadata_props.clear()
    common.ShapeInferencePass(strict_mode=True, data_prop=True)(model)
    paths = dict(modules)
    for node in reversed(model.graph):
        # What a translation or a rewrite put in front of a value belongs to the same module.
        value = node.outputs[0]
        readers = (str(user.outputs[0].name) for user, _ in value.uses())  # those in bodies have no path
        path = paths.setdefault(str(value.name), next((paths[name] for name in readers if name in paths), ""))
        node.name = f"{path}/{value.name}" if path else value.name
    model.graph.name = lowered.name
    model.ir_version = _IR_VERSIONS[opset]
    model.producer_name, model.producer_version = "mobilemix", mobilemix.__version__
    model.doc_string = lowered.metadata.get("description")
    model.metadata_props.update(_metadata(lowered))


def _metadata(lowered: Lowered) -> dict[str, str]:
    """What an app needs beside the graph; lists are JSON."""
    lists = {"mean": lowered.mean, "std": lowered.std, "labels": lowered.labels}
    described = {key: json.dumps(values, ensure_ascii=False) for key, values in lists.items() if values is not None}
    if lowered.complex_names:
        described["complex"] = json.dumps(sorted(lowered.complex_names))
    if lowered.dynamic_batch is not None:
        described["dynamic_batch"] = json.dumps(lowered.dynamic_batch)
    return {"model": lowered.name, **described, **lowered.metadata}


def check(path: Path) -> None:
    """Hold the whole file against the standard, every shape included.

    Raises:
        TargetError: it is not valid ONNX.
    """
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise TargetError(f"the ONNX checker refuses the graph: {first_line(error)}") from error
