"""The Core ML target: compile, run here, and verify step by step."""

import dataclasses
import json
import platform
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import coremltools as ct
import numpy as np
from PIL import Image

from mobilemix import parity
from mobilemix.errors import InputError
from mobilemix.passes import lower_scans
from mobilemix.quantization.data import calibration
from mobilemix.quantization.drift import Drift, drifts
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Array, Check, Inputs, Lowered, Runner
from mobilemix.targets.coreml.audit import FAINT, Audit, audit
from mobilemix.targets.coreml.compress import compress_package, simulated
from mobilemix.targets.coreml.compression import Compression, compression
from mobilemix.targets.coreml.convert import NORMALISATION_KEY, STORED_DTYPES, convert, quiet
from mobilemix.targets.coreml.equivalence import Equivalence, compare
from mobilemix.targets.coreml.executor import Executor
from mobilemix.targets.coreml.layers import layers
from mobilemix.targets.coreml.package import Package, read_package
from mobilemix.targets.coreml.plan import LEAST_IOS, Plan, Rounded, check_options, choose, planned, rounded_values
from mobilemix.targets.coreml.proof import simulation_check, values_check, weights_check
from mobilemix.threads import spread

BUILD_RELATIVE_L2 = 1e-5
"""How far the float32 build may be from the float64 reference: another order of summation, nothing else."""

NATIVE_RELATIVE_L2: Mapping[str, float] = {"fp32": 1e-4, "fp16": 2e-2}
"""How far Core ML itself may be from this executor: its kernels accumulate in another order, and fp16 in fp16."""


class PackageRunner:
    """A saved package, executed by mobilemix's own interpreter (see `mobilemix.targets.base.Runner`)."""

    def __init__(self, package: Package) -> None:
        """Prepare to execute; an fp16 package rounds every value that it declares as fp16."""
        self.package = package
        self.is_fp16 = any(output.dtype == "fp16" for each in package.operations for output in each.outputs)
        self.executor = Executor(package, rounding="fp16" if self.is_fp16 else "none")
        description = package.spec.description
        self.outputs = [
            feature.name for feature in description.output if feature.type.WhichOneof("Type") == "multiArrayType"
        ]
        normalisation = description.metadata.userDefined.get(NORMALISATION_KEY)
        self.normalisation = json.loads(normalisation) if normalisation else None

    def run(self, inputs: Inputs) -> dict[str, Array]:
        """Outputs by name, float32; of a classifier the model's own, not the label and its probabilities."""
        values = self.executor.run(self.feed(inputs))
        return {name: np.asarray(values[name], dtype=np.float32) for name in self.outputs}

    def values(self, inputs: Inputs) -> Iterator[tuple[str, Array]]:
        """Every intermediate value."""
        return self.executor.values(self.feed(inputs))

    def drifts(self, values: Mapping[str, Rounded], samples: Sequence[Inputs]) -> dict[str, Drift]:
        """See `mobilemix.targets.coreml.plan.Observable`; nothing else is rounded."""
        executor = Executor(simulated(self.package, Plan({}, values)), rounding="none")
        return drifts(lambda inputs, probe: executor.probed(self.feed(inputs), probe), samples)

    def feed(self, inputs: Inputs) -> dict[str, Array]:
        """What the package takes: integers as int32, an image as pixels (x · std + mean) · 255 that are not clipped."""
        if self.normalisation is None:
            stored = {name: STORED_DTYPES.get(str(value.dtype), value.dtype) for name, value in inputs.items()}
            return {name: value.astype(stored[name]) for name, value in inputs.items()}
        ((name, value),) = inputs.items()
        mean, std = (np.reshape(self.normalisation[key], (1, -1, 1, 1)) for key in ("mean", "std"))
        return {name: ((value.astype(np.float64) * std + mean) * 255).astype(np.float32)}


class CoreMLTarget:
    """ML Program packages for iOS 15 to 18 (see `mobilemix.targets.base.Target`)."""

    name = "coreml"
    suffix = ".mlpackage"
    precisions = ("fp16", "fp32", *LEAST_IOS)
    takes_images = True
    stored_dtypes: Mapping[str, str] = MappingProxyType(STORED_DTYPES)
    passes = lower_scans()

    def compile(self, lowered: Lowered, recipe: Recipe, destination: Path) -> None:
        """See `convert.convert` and, for what is compressed, `plan.planned`, and their errors."""
        if recipe.precision not in LEAST_IOS:
            convert(lowered, recipe, destination)
            return
        check_options(recipe)
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, f"float{self.suffix}")
            convert(lowered, dataclasses.replace(recipe, precision="fp16"), source)
            package = read_package(source)
            compress_package(source, planned(package, lowered, recipe, PackageRunner(package)), destination)

    def load(self, path: Path) -> Runner:
        """Read a package back. Raises InputError if it is none."""
        return PackageRunner(read_package(path))

    def op_histogram(self, path: Path) -> dict[str, int]:
        """Operations by type, most frequent first, constants not counted."""
        types = Counter(each.type for each in read_package(path).operations if each.type != "const")
        return dict(types.most_common())

    def checks(self, lowered: Lowered, recipe: Recipe, path: Path, samples: Sequence[Inputs]) -> list[Check]:
        """Three steps from float64 to the saved fp16 package, each exact enough to show a single wrong bit.

        (1) The float32 build of the same program agrees with the lowered program in float64. (2) The fp16 package is
        that build with its numbers rounded. (3) The numbers fit fp16. A float32 package is itself the build of step 1.
        On macOS Core ML runs the package, too.
        """
        runner = PackageRunner(read_package(path))
        with tempfile.TemporaryDirectory() as folder:
            build = runner
            if runner.is_fp16:
                full = Path(folder, f"build{self.suffix}")
                convert(lowered, dataclasses.replace(recipe, precision="fp32"), full)
                build = PackageRunner(read_package(full))
            if recipe.precision in LEAST_IOS:
                checks = _compression_checks(build, runner, lowered, recipe, samples)
            else:
                equivalence = compare(build.package, runner.package) if runner.is_fp16 else None
                answers, found = _executed(build, equivalence, samples)
                checks = [_build_check(lowered, answers, samples)]
                if equivalence:
                    checks += [_equivalence_check(equivalence, "fp16"), _range_check(found)]
        return [*checks, _native_check(runner, path, samples)]


def _compression_checks(
    build: PackageRunner, runner: PackageRunner, lowered: Lowered, recipe: Recipe, samples: Sequence[Inputs]
) -> list[Check]:
    """As for fp16, of the float32 build with what is compressed in the package; and that this is what it should be."""
    found = compression(runner.package, build.package)
    simulation = PackageRunner(simulated(build.package, found))
    equivalence = compare(simulation.package, found.float_package)
    answers, ranges = _executed(simulation, equivalence, samples)
    checks = [
        _build_check(lowered, spread(build.run, samples), samples),
        _equivalence_check(equivalence, str(recipe.precision)),
        weights_check(found, build.package, lowered, recipe),
    ]
    if found.values or str(recipe.precision) == "int8":
        checks.append(_values_check(found, build, simulation, lowered, recipe, samples[-1]))
    return [*checks, _range_check(ranges), simulation_check(spread(runner.run, samples), answers)]


def _values_check(
    found: Compression,
    build: PackageRunner,
    simulation: PackageRunner,
    lowered: Lowered,
    recipe: Recipe,
    sample: Inputs,
) -> Check:
    """Observe the float package again, or read what was observed of it."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"float{CoreMLTarget.suffix}")
        convert(lowered, dataclasses.replace(recipe, precision="fp16"), source)
        runner = PackageRunner(read_package(source))
        chosen = choose(layers(runner.package, lowered), recipe)
        try:
            planned = rounded_values(
                runner.package, chosen, recipe, runner, lambda: calibration(lowered, recipe.quantization)
            )
        except InputError as error:
            return Check("rounded values", None, f"they cannot be observed again: {error}")
        return values_check(found, planned, build, simulation, sample)


def _executed(
    build: PackageRunner, equivalence: Equivalence | None, samples: Sequence[Inputs]
) -> tuple[list[dict[str, Array]], Audit | None]:
    """What the float32 build answers, and of the same runs the audit, if its fp16 package is the same program."""
    if equivalence is None or equivalence.differences:
        return spread(build.run, samples), None
    answers: list[dict[str, Array]] = [{} for _ in samples]
    runs = [_noted(build, sample, answer) for sample, answer in zip(samples, answers, strict=True)]
    return answers, audit(build.package, runs, equivalence.in_float16)


def _noted(build: PackageRunner, sample: Inputs, answer: dict[str, Array]) -> Iterator[tuple[str, Array]]:
    """Every value of a run; the outputs among them are entered in `answer` as well."""
    for name, value in build.values(sample):
        if name in build.outputs:
            answer[name] = np.asarray(value, dtype=np.float32)
        yield name, value


def _build_check(lowered: Lowered, answers: Sequence[Mapping[str, Array]], samples: Sequence[Inputs]) -> Check:
    reference = parity.program_reference(lowered.program, samples)
    outputs = [[answer[name] for name in lowered.output_names] for answer in answers]
    error = parity.compare(outputs, reference.outputs).relative_l2
    return Check(
        "fp32 build",
        error <= BUILD_RELATIVE_L2,
        f"relative L2 {error:.1e} from the {reference.dtype} program, at most {BUILD_RELATIVE_L2:.0e}",
    )


def _equivalence_check(equivalence: Equivalence, precision: str) -> Check:
    name = f"{precision} equals fp32"
    if equivalence.differences:
        first, *others = equivalence.differences
        return Check(name, False, first + (f" (and {len(others)} more)" if others else ""))
    return Check(
        name,
        True,
        f"{equivalence.operations} operations the same, {equivalence.constants} constants exactly the rounded ones, "
        f"{len(equivalence.left_in_float32)} operations in float32",
    )


def _range_check(found: Audit | None) -> Check:
    if found is None:
        return Check("range audit", None, "the two programs are not the same")
    if found.overflowing:
        first = found.overflowing[0]
        return Check(
            "range audit",
            False,
            f"'{first.name}' reaches {first.largest:.3g}, the first of {len(found.overflowing)} values and weights "
            "beyond float16's 65504",
        )
    largest, faintest, faint = found.largest, found.faintest, found.faint
    return Check(
        "range audit",
        True,
        f"largest {largest.largest:.3g} in '{largest.name}'; {len(faint)} of {len(found.ranges)} values and weights "
        f"would lose over {FAINT:.0%} of their norm if subnormals were flushed, most '{faintest.name}' "
        f"({faintest.lost:.0%}; {faintest.subnormal:.0%} of its elements)",
    )


def _native_check(runner: PackageRunner, path: Path, samples: Sequence[Inputs]) -> Check:
    """Let Core ML itself predict, where there is one; images are rounded to 8 bits for both."""
    if platform.system() != "Darwin":
        return Check("native", None, "Core ML itself needs macOS")
    feed = runner.feed(samples[-1])
    given: dict[str, Any] = dict(feed)
    if runner.normalisation is not None:
        ((name, pixels),) = feed.items()
        bytes_ = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
        feed = {name: bytes_.astype(np.float32)}
        given = {name: Image.fromarray(bytes_[0].transpose(1, 2, 0).squeeze())}
    with quiet():
        answer = ct.models.MLModel(str(path)).predict(given)
    expected = runner.executor.run(feed)
    error = max(parity.relative_l2(answer[name], expected[name]) for name in runner.outputs)
    limit = NATIVE_RELATIVE_L2["fp16" if runner.is_fp16 else "fp32"]
    return Check("native", error <= limit, f"relative L2 {error:.1e} from Core ML itself, at most {limit:.0e}")
