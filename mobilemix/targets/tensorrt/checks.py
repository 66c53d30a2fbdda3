"""Verification of a TensorRT artifact beyond its outputs: what was parsed, built and run, and what was not."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mobilemix.errors import MobilemixError
from mobilemix.parity import TIERS, relative_l2
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Array, Check, Inputs, Lowered, Runner
from mobilemix.targets.onnx import checks as onnx_checks
from mobilemix.targets.onnx.runtime import OnnxRunner, read_model
from mobilemix.targets.tensorrt import bindings, builder, convert
from mobilemix.targets.tensorrt.bindings import Flavour
from mobilemix.targets.tensorrt.preflight import preflight


def run(lowered: Lowered, recipe: Recipe, path: Path, samples: Sequence[Inputs], flavour: Flavour) -> list[Check]:
    """All of them for one ONNX file and, where there is one, the engine beside it."""
    precision = str(recipe.precision)
    found = [onnx_checks.valid(path), supported(path)]
    if precision in onnx_checks.OPTIMISATION_TOLERANCE:
        found.append(onnx_checks.optimisable(path, precision, samples))
    if precision == "fp16":
        found += onnx_checks.rounding(lowered, recipe, path, samples, convert.STEPS)
    engine = convert.engine_path(path)
    if not engine.exists():
        return [*found, *unbuilt(path, recipe, flavour)]
    return [*found, *ran(path, engine, recipe, samples, flavour)]


def supported(path: Path) -> Check:
    """The published list of NVIDIA's parser has every node."""
    refusals = preflight(path)
    if refusals:
        detail = f"{refusals[0].operator} {refusals[0].node}: {refusals[0].reason}"
    else:
        detail = f"all {len(read_model(path).graph.node)} nodes are on its list for TensorRT 10.0"
    return Check("NVIDIA's parser, by its list", not refusals, detail)


def unbuilt(path: Path, recipe: Recipe, flavour: Flavour) -> list[Check]:
    """Without an engine: what TensorRT for RTX makes of the file, if it is installed, and what was not checked."""
    reason = builder.can_build(flavour) or f"{convert.engine_path(path).name} is not there"
    advice = f"on the device, run trtexec --onnx={path.name} --stronglyTyped, or export again"
    other = builder.can_build("tensorrt-rtx")
    parser = "neither parsed by TensorRT nor built" if other else "not built by TensorRT"
    missing = Check("TensorRT engine", None, f"{parser}: {reason}; {advice}")
    return [missing] if other else [ahead_of_time(path, recipe), missing]


def ahead_of_time(path: Path, recipe: Recipe) -> Check:
    """TensorRT for RTX, whose parser is TensorRT's own, parses the file and builds an engine that is not kept."""
    name = builder.NAMES["tensorrt-rtx"]
    with tempfile.TemporaryDirectory() as folder:
        engine = Path(folder, "engine")
        options = builder.BuildOptions(workspace_mb=recipe.workspace_mb, batch=convert.options_of(recipe).batch)
        try:
            built = builder.build(path, engine, Path(folder, "log"), "tensorrt-rtx", options)
        except MobilemixError as error:
            return Check(name, False, str(error))
    detail = f"{built.builder} parses it and builds {built.bytes / 1e6:.2f} MB in {built.seconds:.1f} s, not kept"
    return Check(name, True, detail)


def ran(path: Path, engine: Path, recipe: Recipe, samples: Sequence[Inputs], flavour: Flavour) -> list[Check]:
    """With an engine: that it was built, and how it agrees with the ONNX file where a GPU can run it."""
    name = builder.NAMES[flavour]
    built = Check(f"{name} engine", True, f"parsed and built, {engine.stat().st_size / 1e6:.2f} MB")
    if reason := bindings.missing_gpu():
        advice = f"on the device, run mobilemix verify {path.name}"
        return [built, Check("engine parity", None, f"the engine was not run: {reason}; {advice}")]
    tolerance = TIERS[str(recipe.precision)].relative_l2
    try:
        ours, reference = runner(engine, flavour), OnnxRunner(path)
        errors = [
            relative_l2(value, reference_value)
            for sample in samples
            for value, reference_value in _pairs(ours.run(sample), reference.run(sample))
        ]
    except MobilemixError as error:
        return [built, Check("engine parity", False, str(error))]
    worst = float(np.max(errors, initial=0))
    detail = f"relative L2 {worst:.1e} of {tolerance:.0e} against the ONNX file in ONNX Runtime"
    return [built, Check("engine parity", worst <= tolerance, detail)]


def runner(engine: Path, flavour: Flavour) -> Runner:
    """What executes an engine on this machine's GPU."""
    if flavour == "tensorrt-rtx":
        from mobilemix.targets.tensorrt.rtx import RtxRunner

        return RtxRunner(engine)
    from mobilemix.targets.tensorrt.engine import EngineRunner

    return EngineRunner(engine)


def _pairs(values: Mapping[str, Array], expected: Mapping[str, Array]) -> list[tuple[Array, Array]]:
    return [(values[name], reference) for name, reference in expected.items()]
