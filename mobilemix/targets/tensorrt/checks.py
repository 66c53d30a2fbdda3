"""Verification of a TensorRT artifact beyond its outputs: what was parsed, built and run, and what was not."""

import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mobilemix.errors import MobilemixError
from mobilemix.parity import TIERS
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Check, Inputs, Lowered, Runner
from mobilemix.targets.onnx import checks as onnx_checks
from mobilemix.targets.onnx.quantize import stated_lost
from mobilemix.targets.onnx.quantized import unheld_check
from mobilemix.targets.onnx.runtime import OnnxRunner, read_model
from mobilemix.targets.tensorrt import bindings, builder, convert, trtexec
from mobilemix.targets.tensorrt.bindings import Flavour
from mobilemix.targets.tensorrt.engine import EngineRunner
from mobilemix.targets.tensorrt.preflight import preflight
from mobilemix.targets.tensorrt.rtx import RtxRunner

RUNS = 20
"""Executions of which the latency is the median."""


def run(lowered: Lowered, recipe: Recipe, path: Path, samples: Sequence[Inputs], flavour: Flavour) -> list[Check]:
    """All of them for one ONNX file and, where there is one, the engine beside it."""
    precision = str(recipe.precision)
    found = [onnx_checks.valid(path), supported(path)]
    if precision != "fp32":
        lost = stated_lost(path)
        layers = convert.layers_of(recipe, lost)
        found += onnx_checks.rounding(lowered, recipe, path, samples, convert.STEPS, layers)
        found += unheld_check(lost)
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
    engine, options = convert.engine_path(path), convert.options_of(recipe)
    reason = builder.can_build(flavour) or f"{engine.name} is not there"
    profile = builder.profile_of(path, options.batch)
    command = trtexec.arguments("trtexec", Path(path.name), Path(engine.name), options, profile)
    advice = f"to check it, export again on a machine that can build, or run {' '.join(command)}"
    name, other = builder.NAMES[flavour], builder.can_build("tensorrt-rtx")
    parser = f"neither parsed by {name} nor built" if other else f"not built by {name}"
    missing = Check(f"{name} engine", None, f"{parser}: {reason}; {advice}")
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
    built = Check(f"{builder.NAMES[flavour]} engine", True, f"parsed and built, {engine.stat().st_size / 1e6:.2f} MB")
    if reason := bindings.missing_gpu():
        advice = f"on the device, run mobilemix verify {path.name}"
        return [built, Check("engine parity", None, f"the engine was not run: {reason}; {advice}")]
    tolerance = TIERS[str(recipe.precision)].relative_l2
    try:
        ours, reference = runner(engine, recipe, flavour), OnnxRunner(path, optimised=False)
        sized = [each for sample in samples for each in _sized(path, recipe, sample)]
        errors = [error for sample in sized for error in onnx_checks.errors_of(ours.run(sample), reference.run(sample))]
        latency = f" · {_latency(ours, sized[-1])}" if isinstance(ours, EngineRunner) else ""
    except MobilemixError as error:
        return [built, Check("engine parity", False, str(error))]
    worst = float(np.max(errors, initial=0))
    detail = f"relative L2 {worst:.1e} of {tolerance:.0e} against the ONNX file · {bindings.gpu_name()}{latency}"
    return [built, Check("engine parity", worst <= tolerance, detail)]


def runner(engine: Path, recipe: Recipe, flavour: Flavour) -> Runner:
    """What executes an engine on this machine's GPU."""
    if flavour == "tensorrt-rtx":
        return RtxRunner(engine)
    return EngineRunner(engine, host_code=recipe.version_compatible)


def _sized(path: Path, recipe: Recipe, sample: Inputs) -> Iterator[Inputs]:
    """A sample at every batch that an engine of a dynamic one was built for; the sample itself of a fixed one."""
    free = builder.profile_of(path, recipe.dynamic_batch)
    for batch in sorted(set(recipe.dynamic_batch or (0,))):
        yield {
            name: np.resize(value, (batch, *value.shape[1:])) if name in free else value
            for name, value in sample.items()
        }


def _latency(engine: EngineRunner, sample: Inputs) -> str:
    batch = next(iter(sample.values())).shape[0]
    return f"{statistics.median(engine.latencies(sample, RUNS)):.2f} ms at batch {batch}"
