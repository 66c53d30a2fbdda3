"""What notebooks import and the command line calls: from a model to a verified artifact, in one direction.

recipe → source → capture → passes → target.compile → artifact → verify → manifest
"""

import contextlib
import dataclasses
import functools
import gc
import glob
import itertools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mobilemix import __version__, assets, batches, files, progress
from mobilemix.capture import capture
from mobilemix.errors import BatchError, CaptureError, InputError, MissingDependencyError, UnknownNameError
from mobilemix.evaluation import Evaluation, form_of_artifact, measure, truth_of
from mobilemix.labels import read_labels
from mobilemix.manifest import Manifest, dumps, manifest_path, read_manifest, versions
from mobilemix.models.checkpoint import fingerprint
from mobilemix.parity import TIERS, Parity, Reference, compare, first_departure, noise, reference
from mobilemix.passes import SHARED, lower
from mobilemix.preprocess import Preprocess
from mobilemix.quantization.cache import digest
from mobilemix.quantization.data import GIVEN, SAMPLES, form_of, open_dataset, take
from mobilemix.quantization.data import calibration as calibration_of
from mobilemix.quantization.equalize import equalize
from mobilemix.quantization.mixed import investigate, judged, quantizable
from mobilemix.quantization.options import EQUALIZATIONS, FLOAT, USED, Quantization, check_used
from mobilemix.quantization.report import Report, page
from mobilemix.quantization.search import OBJECTIVES, Judge
from mobilemix.recipe import CALIBRATED, DEFAULT_MODEL, InputKind, Precision, Recipe, opset_of, write_recipe
from mobilemix.shims import TRITON, shim
from mobilemix.signature import inputs_of, outputs_of
from mobilemix.source import AUTOMATIC, Source, load_source
from mobilemix.targets import find_target, require
from mobilemix.targets.base import Check, Inputs, Lowered, Target
from mobilemix.threads import spread

NOISE_SAMPLES = 2
PHOTOGRAPHS = 5
ROWS = 4
"""Photographs of which dynamic batches are made, or samples of noise where there are none; else 2 of these."""


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Keep Python from looking for garbage, which takes it through every object of torch, for little."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


Listener = Callable[[str], None]
"""Told the name of each stage as it begins."""


def _silent(_stage: str) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Export:
    """A finished export.

    Attributes:
        path: the artifact; in a folder `failed` of the output folder if verification failed.
        manifest: what stands beside it.
        parity: the verdict; `parity.passed` says whether it matches PyTorch.
    """

    path: Path
    manifest: Manifest
    parity: Parity


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model that is captured and lowered, ready for any number of targets.

    Attributes:
        source: the model as it came.
        lowered: the same after capture and the passes that all targets share.
        output_dtypes: of the source's outputs.
        passes: names of those that changed something.
        seconds: wall time by stage.
    """

    source: Source
    lowered: Lowered
    output_dtypes: tuple[str, ...]
    passes: tuple[str, ...]
    seconds: Mapping[str, float]

    @functools.cached_property
    def samples(self) -> dict[str, list[Inputs]]:
        """Inputs to compare on: noise, and the shipped photographs if the input is an image of batch 1."""
        if self.trials is not None:
            return self.trials.samples()
        inputs = inputs_of(self.lowered.program)
        samples = {"noise": noise(inputs, NOISE_SAMPLES)}
        if self.source.preprocess is not None and inputs[0].shape[0] == 1:
            samples["photographs"] = self._photographs(PHOTOGRAPHS)
        return samples

    @functools.cached_property
    def probes(self) -> dict[str, Inputs]:
        """One sample of each set, of the very shapes that the program has."""
        if self.trials is not None:
            return self.trials.probes()
        return {name: samples[-1] for name, samples in self.samples.items()}

    @functools.cached_property
    def trials(self) -> batches.Trials | None:
        """What a dynamic batch is tried on; None for a fixed one."""
        if self.lowered.dynamic_batch is None:
            return None
        shapes = self.source.input_shapes
        inputs = inputs_of(self.lowered.program)
        batched = {each.name for each, shape in zip(inputs, shapes, strict=True) if batches.has_batch(shape, shapes)}
        single = [
            dataclasses.replace(each, shape=(1, *each.shape[1:])) if each.name in batched else each for each in inputs
        ]
        is_image = self.source.preprocess is not None
        first, *others = noise(single, NOISE_SAMPLES if is_image else ROWS)
        shared = {name: value for name, value in first.items() if name not in batched}
        rows = {"noise": [first, *({**other, **shared} for other in others)]}
        if is_image:
            rows["photographs"] = self._photographs(ROWS)
        sizes = batches.sizes_to_try(*self.lowered.dynamic_batch)
        return batches.Trials(rows, sizes, frozenset(batched), captured=inputs[0].shape[0])

    def _photographs(self, count: int) -> list[Inputs]:
        assert self.source.preprocess is not None
        (name,) = self.lowered.input_names
        return [{name: self.source.preprocess(path)} for path in assets.photographs()[:count]]

    @functools.cached_property
    def specialised(self) -> dict[tuple[str, Quantization | None], tuple[Lowered, tuple[str, ...]]]:
        """What `_specialise` made of it: the precisions of one target start from one program."""
        return {}

    @functools.cached_property
    def references(self) -> dict[str, Reference]:
        """What the source model answers to the samples."""
        if self.trials is not None:
            return self.trials.references(self.ask)
        answered = self.ask([sample for samples in self.samples.values() for sample in samples])
        outputs = iter(answered.outputs)
        return {
            name: dataclasses.replace(answered, outputs=list(itertools.islice(outputs, len(samples))))
            for name, samples in self.samples.items()
        }

    def ask(self, samples: Sequence[Inputs]) -> Reference:
        """What the source model answers to any samples of its shapes."""
        with shim(*self.source.shim):
            return reference(self.source.module, samples, complex_inputs=self.lowered.complex_names)


def export(
    model: str | nn.Module = DEFAULT_MODEL,
    *,
    output: Path | str = ".",
    calibration: Iterable[Any] | None = None,
    listener: Listener = _silent,
    **options: Any,
) -> Export:
    """Export a model to one target, verify the artifact and write its manifest.

    Args:
        model: a registry name, `path/to/file.py:factory`, `package.module:factory`, or a module.
        output: folder for the artifact and its manifest.
        calibration: samples that 8-bit ranges are calibrated on, in place of `quantization.data`: arrays, or dicts of
            arrays by input name, of the forms of `mobilemix.quantization.data.open_dataset`. `quantization.samples` of
            them are taken, 128 if that is None.
        listener: told the name of each stage as it begins.
        **options: the other fields of `Recipe` (target, precision, input_shapes, input_dtypes, …); `shim` may be one
            name.

    Returns:
        The export; a failed verification is in its `parity`, not an exception.

    Raises:
        MobilemixError: see `mobilemix.errors`; nothing was written, and an older artifact is as it was.
    """
    recipe, prepared = _asked(model, calibration, options, listener)
    return deploy(prepared, recipe, Path(output), listener=listener)


def _asked(
    model: str | nn.Module, calibration: Iterable[Any] | None, options: dict[str, Any], listener: Listener
) -> tuple[Recipe, Prepared]:
    """The recipe of a call, and its model; see `export`."""
    module = model if isinstance(model, nn.Module) else None
    if isinstance(options.get("shim"), str):
        options["shim"] = (options["shim"],)
    recipe = Recipe(model=type(model).__name__ if module is not None else str(model), **options)
    if calibration is not None:
        recipe = dataclasses.replace(recipe, quantization=dataclasses.replace(recipe.quantization, data=GIVEN))
    require(recipe.target)
    prepared = prepare(recipe, module=module, listener=listener)
    if calibration is not None:
        taken = take(calibration, form_of(prepared.lowered), recipe.quantization.samples or SAMPLES)
        prepared = dataclasses.replace(prepared, lowered=dataclasses.replace(prepared.lowered, calibration=taken))
    return recipe, prepared


@_uncollected()
def prepare(recipe: Recipe, *, module: nn.Module | None = None, listener: Listener = _silent) -> Prepared:
    """Load, capture and lower a recipe's model; the recipe's target hardly matters yet. Raises as `export` does."""
    labels = read_labels(recipe.labels) if recipe.labels else None  # first: a wrong path should not cost a minute
    stages = _Stages(listener)
    with stages("load"):
        source = load_source(recipe, module)
    if recipe.dynamic_batch is None:
        return _lowered(source, recipe, labels, stages)
    for pair in batches.PAIRS:
        prepared = _lowered(source, recipe, labels, stages, pair)
        # Passes that choose a form by size may have chosen one for the smaller batch and another for the larger.
        lowered, _ = _specialise(prepared, find_target(recipe.target), recipe)
        if batches.is_one_graph(lowered):
            break
    with stages("reference"):
        _ = prepared.references  # what depends on the batch should not cost a compilation
    return prepared


def _lowered(
    source: Source,
    recipe: Recipe,
    labels: tuple[str, ...] | None,
    stages: "_Stages",
    pair: tuple[int, ...] = (),
) -> Prepared:
    """Capture and lower a model, at the shapes of its source or for two batches."""
    with stages("capture"):
        captured, *more = [_capture_batch(source, batch) for batch in pair] or [capture_source(source)]
    with stages("rewrite"):
        passes: list[str] = []
        program = lower(captured, SHARED, log=passes.append)
        larger = next((lower(each, SHARED) for each in more), None)
    if larger is not None:
        batches.check_outputs(program, larger)
    input_names = tuple(each.name for each in inputs_of(program))
    shapes = [shape for shape, _ in outputs_of(program)]
    output_names = _output_names(shapes)
    output_dtypes = tuple(dtype for _, dtype in outputs_of(captured))
    source_dtypes = zip((*input_names, *output_names), (*source.input_dtypes, *output_dtypes), strict=True)
    preprocess = source.preprocess
    lowered = Lowered(
        name=source.name,
        program=program,
        input_names=input_names,
        output_names=output_names,
        mean=preprocess.mean if preprocess else None,
        std=preprocess.std if preprocess else None,
        crop_pct=preprocess.crop_pct if preprocess else Preprocess.crop_pct,
        labels=_labels(labels, source, shapes[0]),
        metadata={**source.metadata, "version": __version__},
        complex_names=frozenset(name for name, dtype in source_dtypes if dtype.startswith("complex")),
        dynamic_batch=recipe.dynamic_batch,
        larger=larger,
    )
    return Prepared(source, lowered, output_dtypes, _distinct(passes), stages.seconds)


def _capture_batch(source: Source, batch: int) -> ExportedProgram:
    shapes = batches.resized(source.input_shapes, batch)
    try:
        return capture_source(dataclasses.replace(source, input_shapes=shapes))
    except CaptureError as error:
        raise BatchError(f"the model cannot take a batch of {batch}: {error}") from error


def capture_source(source: Source) -> ExportedProgram:
    """Capture a loaded model at the shapes and dtypes of its inputs; raises as `capture` does."""
    with shim(*source.shim):
        try:
            return capture(source.module, _example(source))
        except CaptureError as error:
            # Guarded imports load, and leave None to be called. (Triton is looked for by many that do not need it.)
            names = " and ".join(name for name in source.missing if name != TRITON)
            if not names:
                raise
            raise CaptureError(f"{error}; {names} could not be imported: --shim {AUTOMATIC} stands in") from error


@_uncollected()
def deploy(prepared: Prepared, recipe: Recipe, folder: Path, *, listener: Listener = _silent) -> Export:
    """Compile a prepared model for the recipe's target, verify the file and write its manifest; raises as `export`."""
    require(recipe.target)
    target = find_target(recipe.target)
    recipe = _resolve(recipe, target, prepared)
    stages = _Stages(listener)
    with files.staging(folder) as stage:
        artifact = stage / f"{prepared.source.name}{target.suffix}"
        with stages("compile"):
            lowered, passes = _specialise(prepared, target, recipe)
            provenance = _provenance(prepared, passes, recipe, target)
            metadata = {**lowered.metadata, "mobilemix.provenance": dumps(provenance, indent=None)}
            lowered = dataclasses.replace(lowered, metadata=metadata)
            build = target.compile(lowered, recipe, artifact) or {}
        with stages("verify"):
            parity = _verify(prepared, lowered, target, recipe, artifact)
        manifest = Manifest(
            recipe=recipe,
            provenance=provenance,
            artifact={
                "file": artifact.name,
                "sha256": files.sha256(artifact),
                "bytes": files.size(artifact),
                "operators": target.op_histogram(artifact),
            },
            parity={"passed": parity.passed, **vars(parity)},
            seconds={**prepared.seconds, **stages.seconds},
            build=build,
        )
        manifest_path(artifact).write_text(manifest.to_json() + "\n", encoding="utf-8")
        # What failed is kept for a look, but never where an app's build would pick it up.
        destination = folder if parity.passed else folder / "failed"
        destination.mkdir(exist_ok=True)
        outdated = _built_beside(destination / artifact.name) - {made.name for made in stage.iterdir()}
        for made in sorted(stage.iterdir(), key=lambda path: path == manifest_path(artifact)):
            files.replace(made, destination / made.name)
        for name in outdated:  # an engine of the artifact that was here before
            (destination / name).unlink(missing_ok=True)
    return Export(destination / artifact.name, manifest, parity)


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A finished export in mixed precision.

    Attributes:
        export: the artifact, its manifest and verdict.
        report: what the layers cost and how the choice was found.
        recipe: TOML file that reproduces the artifact.
        page: HTML file of the report; None where plotly, which draws it, is not installed.
    """

    export: Export
    report: Report
    recipe: Path
    page: Path | None


def quantize(
    model: str | nn.Module = DEFAULT_MODEL,
    *,
    output: Path | str = ".",
    calibration: Iterable[Any] | None = None,
    data: Path | str | None = None,
    samples: int | None = None,
    max_drop: float = 0.005,
    objective: str = "latency",
    listener: Listener = _silent,
    **options: Any,
) -> Quantized:
    """Export a model with as many layers quantised as a limit on the lost accuracy allows, and write how it was found.

    Beside the artifact and its manifest, named `NAME.TARGET`, are a recipe (.toml) and a page with plots
    (.quantization.html).

    Args:
        model, output, calibration, listener: as of `export`.
        data: what the loss is measured on: top-1 where it has classes (see `mobilemix.evaluate`), else agreement with
            the float model; None is what the ranges are calibrated on.
        samples: at most so many of `data`; None is `mobilemix.quantization.mixed.JUDGED`.
        max_drop: largest loss, from 0 to 1.
        objective: what is saved, "latency" or "size".
        **options: the other fields of `Recipe`; the target is "onnx" and the precision "int8" unless given.

    Raises:
        InputError: no choice of layers keeps within the limit, or the target has no such choice.
        MobilemixError: as of `export`.
    """
    if not 0 <= max_drop < 1:
        raise InputError(f"max_drop must be at least 0 and below 1, not {max_drop}; 0.005 is half a percent")
    if objective not in OBJECTIVES:
        raise UnknownNameError("objective", objective, OBJECTIVES)
    recipe, prepared = _asked(model, calibration, {"target": "onnx", "precision": "int8", **options}, listener)
    target = find_target(recipe.target)
    recipe = _resolve(recipe, target, prepared)
    lowered, _ = _specialise(prepared, target, recipe)
    stages = _Stages(listener)
    with tempfile.TemporaryDirectory() as folder:
        with stages("observe"):
            calibrated = calibration_of(lowered, recipe.quantization)
            subject = quantizable(lowered, recipe, Path(folder))
            shown, labels = (
                judged(lowered, Path(data), samples, recipe.quantization.seed) if data else (calibrated, None)
            )
            judge = Judge.of(subject.reference(), shown, labels)
        report = investigate(
            subject,
            calibrated,
            judge,
            objective=objective,
            max_drop=max_drop,
            progress=listener,
            recipe=recipe,
            model=prepared.source.name,
        )
    layers = tuple((glob.escape(name), FLOAT) for name in report.choice.chosen.kept)
    how = recipe.quantization
    how = dataclasses.replace(how, layers=(*how.layers, *layers))
    made = deploy(prepared, dataclasses.replace(recipe, quantization=how), Path(output), listener=listener)
    place = made.path.with_name(f"{prepared.source.name}.{target.name}")
    written, drawn = (place.with_name(f"{place.name}{suffix}") for suffix in (".toml", ".quantization.html"))
    write_recipe(made.manifest.recipe, written)
    try:
        drawn.write_text(page(report), encoding="utf-8")
    except MissingDependencyError:
        return Quantized(made, report, written, None)
    return Quantized(made, report, written, drawn)


def verify(
    artifact: Path | str,
    *,
    model: str | nn.Module | None = None,
    weights: Path | None = None,
    listener: Listener = _silent,
) -> Parity:
    """Verify an artifact again, later, from the manifest beside it.

    Args:
        artifact: a file or package that `export` wrote.
        model: the source to compare with; None is the manifest's own.
        weights: its checkpoint; None is the manifest's own.
        listener: told the name of each stage as it begins.

    Raises:
        MobilemixError: no manifest, an artifact that cannot be read, or a source that cannot be loaded.
    """
    artifact = Path(artifact)
    manifest, recipe, module = _origin(artifact, model, weights)
    stages = _Stages(listener)
    prepared = prepare(recipe, module=module, listener=listener)
    with stages("verify"):
        target = find_target(recipe.target)
        lowered, _ = _specialise(prepared, target, recipe)
        parity = _verify(prepared, lowered, target, recipe, artifact)
    unchanged = Check(
        "unchanged",
        files.sha256(artifact) == manifest.artifact["sha256"],
        "the artifact has the SHA-256 that its manifest states",
    )
    same = Check(
        "weights",
        fingerprint(prepared.source.module) == manifest.provenance["model"]["weights_sha256"],
        "the source has the weights that were exported",
    )
    beside = [
        Check(f"{name} unchanged", _has_digest(artifact.with_name(name), digest), "it has the SHA-256 of the manifest")
        for name, digest in manifest.build.get("files", {}).items()
    ]
    return dataclasses.replace(parity, checks=(*parity.checks, unchanged, *beside, same))


def evaluate(
    artifact: Path | str,
    dataset: Path | str,
    *,
    samples: int | None = None,
    seed: int = 0,
    model: str | nn.Module | None = None,
    weights: Path | None = None,
    listener: Listener = _silent,
) -> Evaluation:
    """Measure an artifact's accuracy on a data set, and how often it agrees with the float model that it was made from.

    Args:
        artifact: a file or package that `export` wrote, with its manifest beside it.
        dataset: a folder with a subfolder of images for each class, any other folder of images, or an .npy or .npz
            file (see `mobilemix.quantization.data.open_dataset`).
        samples: at most so many, spread over all; None for all.
        seed: of their choice.
        model: the float model to compare with; None is the manifest's own.
        weights: its checkpoint; None is the manifest's own.
        listener: told the name of each stage as it begins, and how many samples are done.

    Raises:
        MobilemixError: no manifest, an artifact or a data set that cannot be read, or a source that cannot be loaded.
    """
    artifact, data = Path(artifact), Path(dataset)
    manifest, recipe, module = _origin(artifact, model, weights)
    if not data.exists():
        raise InputError(f"there is no data set {data}; give a folder of images, an .npy or an .npz file")
    if samples is not None and samples < 1:
        raise InputError(f"samples must be at least 1, not {samples}")
    stages = _Stages(listener)
    with stages("load"):
        runner = find_target(recipe.target).load(artifact)
        source = load_source(recipe, module)
        form = form_of_artifact(manifest.provenance, source.preprocess)
        opened = open_dataset(data, form)
        shape = next(iter(manifest.provenance["outputs"].values()))["shape"]
        classes = shape[1] if len(shape) == 2 and shape[0] in (form.size, batches.BATCH) else 0
        labels = _labels(read_labels(recipe.labels) if recipe.labels else None, source, (form.size, classes))
        truth = truth_of(opened, data, labels, classes)
    with stages("evaluate"), shim(*source.shim):
        return measure(
            runner,
            source.module,
            opened,
            form,
            tuple(manifest.provenance["outputs"]),
            truth=truth,
            classes=classes,
            samples=samples,
            seed=seed,
        )


def _origin(
    artifact: Path, model: str | nn.Module | None, weights: Path | None
) -> tuple[Manifest, Recipe, nn.Module | None]:
    """An artifact's manifest, and the recipe and module of what it is compared with."""
    if not artifact.exists():
        raise InputError(f"there is no artifact {artifact}")
    manifest = read_manifest(artifact)
    recipe = manifest.recipe
    require(recipe.target)
    if isinstance(model, str):
        recipe = dataclasses.replace(recipe, model=model)
    if weights is not None:
        recipe = dataclasses.replace(recipe, weights=weights)
    return manifest, recipe, model if isinstance(model, nn.Module) else None


def _has_digest(path: Path, digest: str) -> bool:
    return path.is_file() and files.sha256(path) == digest


def _built_beside(artifact: Path) -> set[str]:
    """Names of what was built besides an artifact, by its manifest."""
    try:
        build = read_manifest(artifact).build
    except InputError:
        return set()
    names = [*build.get("files", {}), build.get("log")]
    return {Path(name).name for name in names if name}


def _specialise(prepared: Prepared, target: Target, recipe: Recipe) -> tuple[Lowered, tuple[str, ...]]:
    """The model after the target's own passes too, equalised if the recipe says so; and what changed it, by name."""
    options = recipe.quantization
    key = target.name, None if options.equalization == EQUALIZATIONS[0] else options
    if key not in prepared.specialised:
        passes = list(prepared.passes)
        program = lower(prepared.lowered.program, target.passes, log=passes.append)
        larger = prepared.lowered.larger and lower(prepared.lowered.larger, target.passes)
        lowered = dataclasses.replace(prepared.lowered, program=program, larger=larger)
        samples = calibration_of(lowered, options) if options.equalization == "smooth" else ()
        lowered, layers = equalize(lowered, options.equalization, samples)
        if layers:
            passes.append(f"{options.equalization} equalization of {len(layers)} layers")
        prepared.specialised[key] = lowered, _distinct(passes)
    return prepared.specialised[key]


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _verify(prepared: Prepared, lowered: Lowered, target: Target, recipe: Recipe, artifact: Path) -> Parity:
    tolerance = TIERS[str(recipe.precision)]
    if recipe.tolerance is not None:
        tolerance = dataclasses.replace(tolerance, relative_l2=recipe.tolerance)
    runner = target.load(artifact)
    sets, references = _compared(prepared, lowered, recipe)
    agreement = {}
    for name, samples in sets.items():
        answers = spread(runner.run, samples)
        outputs = [[answer[output] for output in lowered.output_names] for answer in answers]
        if prepared.trials is not None:
            outputs = batches.unstacked(outputs)
        agreement[name] = compare(outputs, references[name].outputs)
    # Noise and, where there is one, a photograph.
    probes = {name: prepared.probes.get(name, samples[-1]) for name, samples in sets.items()}
    distinct = {id(probe): probe for probe in probes.values()}
    checks = target.checks(lowered, recipe, artifact, list(distinct.values()))
    if recipe.max_size_mb is not None:
        megabytes = files.size(artifact) / 1e6
        checks.append(
            Check("size", megabytes <= recipe.max_size_mb, f"{megabytes:.2f} MB of {recipe.max_size_mb:g} MB")
        )
    worst = max(agreement, key=lambda name: agreement[name].relative_l2)
    departs = None
    if not agreement[worst].within(tolerance):
        departs = first_departure(lowered.program, runner, probes[worst], tolerance.relative_l2)
        departs = departs or "no value departs from the rewritten program: the capture or a pass changed the function"
    return Parity(agreement, references[worst].dtype, tolerance, tuple(checks), departs)


def _compared(
    prepared: Prepared, lowered: Lowered, recipe: Recipe
) -> tuple[Mapping[str, list[Inputs]], Mapping[str, Reference]]:
    """Inputs that an artifact is compared on, by the name of their set, and what the source answers to them."""
    sets, references = prepared.samples, prepared.references
    if recipe.precision not in USED[recipe.target]:
        return sets, references
    # Fewer bits are for what a model is used on: they make little of noise, and no range is calibrated for it.
    pictures = {name: samples for name, samples in sets.items() if not name.startswith("noise")}
    if pictures or recipe.precision not in CALIBRATED or prepared.trials is not None:
        return pictures or sets, references
    shown = calibration_of(lowered, recipe.quantization)[:PHOTOGRAPHS]
    return {"calibration": shown}, {"calibration": prepared.ask(shown)}


def _resolve(recipe: Recipe, target: Target, prepared: Prepared) -> Recipe:
    """Every default made explicit, so that the manifest says what was done."""
    if recipe.dynamic_batch != prepared.lowered.dynamic_batch:
        raise InputError("the model was prepared for another dynamic_batch; prepare it with this recipe")
    precision = recipe.precision or target.precisions[0]
    if precision not in target.precisions:
        raise UnknownNameError(f"precision for the target {target.name}", precision, target.precisions)
    check_used(recipe.quantization, target.name, precision)
    shape = prepared.source.input_shapes[0]
    possible = target.takes_images and prepared.source.preprocess is not None and shape[0] == 1
    if recipe.input == "image" and not possible:
        reason = (
            f"the target {target.name} takes tensors" if not target.takes_images else "the model's input is no image"
        )
        raise InputError(f"{reason}; use --input tensor")
    kind: InputKind = recipe.input or ("image" if possible else "tensor")
    resolved = dataclasses.replace(recipe, precision=cast(Precision, precision))
    return dataclasses.replace(
        resolved,
        opset=recipe.opset or opset_of(resolved),
        input=kind,
        input_shapes=prepared.source.input_shapes,
        input_dtypes=prepared.source.input_dtypes,
        shim=prepared.source.shim,
    )


def _provenance(prepared: Prepared, passes: tuple[str, ...], recipe: Recipe, target: Target) -> dict[str, Any]:
    source, lowered = prepared.source, prepared.lowered
    given = lowered.calibration  # what the recipe cannot name

    trials = prepared.trials
    batched = trials.batched.union(lowered.output_names) if trials else ()

    def stated(name: str, shape: tuple[int, ...], dtype: str, source_dtype: str) -> dict[str, Any]:
        """What the artifact takes or gives, and what that is in the source where it is not the same."""
        sizes = (batches.BATCH, *shape[1:]) if name in batched else shape
        dtype = target.stored_dtypes.get(dtype, dtype)
        origin = {} if dtype == source_dtype else {"source": source_dtype}
        return {"shape": sizes, "dtype": dtype, **origin, **(_PAIRS if source_dtype.startswith("complex") else {})}

    inputs = zip(inputs_of(lowered.program), source.input_dtypes, strict=True)
    outputs = zip(lowered.output_names, outputs_of(lowered.program), prepared.output_dtypes, strict=True)
    return {
        "model": {
            "name": source.name,
            "weights": source.weights,
            "weights_sha256": fingerprint(source.module),
            "parameters": sum(parameter.numel() for parameter in source.module.parameters()),
        },
        "inputs": {each.name: stated(each.name, each.shape, each.dtype, dtype) for each, dtype in inputs},
        "preprocess": source.preprocess,
        "outputs": {name: stated(name, *value, dtype) for name, value, dtype in outputs},
        **(
            {"batch": dict(zip(("min", "opt", "max"), recipe.dynamic_batch, strict=True))}
            if recipe.dynamic_batch
            else {}
        ),
        "labels": len(lowered.labels) if lowered.labels else 0,
        "target": recipe.target,
        "precision": recipe.precision,
        **({"calibration": {"samples": len(given), "sha256": digest(given)}} if given else {}),
        "passes": passes,
        "versions": versions(recipe.target),
    }


_PAIRS = {"last_axis": ("re", "im")}
"""How a complex tensor is stored: as `torch.view_as_real` lays it out."""


def _example(source: Source) -> tuple[Tensor, ...]:
    dtypes = [getattr(torch, name) for name in source.input_dtypes]
    return tuple(torch.zeros(shape, dtype=dtype) for shape, dtype in zip(source.input_shapes, dtypes, strict=True))


def _labels(given: tuple[str, ...] | None, source: Source, output: tuple[int, ...]) -> tuple[str, ...] | None:
    """The labels given, which must fit the first output, (batch, classes); or the source's own if they do."""
    classes = output[-1] if len(output) == 2 else 0
    if given and len(given) != classes:
        raise InputError(f"{len(given)} labels were given, but {source.name} has {classes} classes")
    labels = given or read_labels(source.labels)
    return labels if len(labels) == classes else None


def _output_names(shapes: list[tuple[int, ...]]) -> tuple[str, ...]:
    """`logits` for a classifier's (batch, classes), else `output` or `output_0`, `output_1`, …"""
    if len(shapes) == 1:
        return ("logits",) if len(shapes[0]) == 2 else ("output",)
    return tuple(f"output_{index}" for index in range(len(shapes)))


class _Stages:
    """Wall time by stage, in seconds."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        with progress.stage(name, self.listener):
            yield
        self.seconds[name] = round(self.seconds.get(name, 0) + time.perf_counter() - start, 3)
