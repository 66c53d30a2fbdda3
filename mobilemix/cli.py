"""The command line: it parses, calls `mobilemix.api` and prints, nothing else.

Heavy imports stay inside the commands, so that `mobilemix --help` answers at once.
Exit codes: 0 done and verified, 1 verification failed, 2 anything that the user can mend.
"""

import atexit
import dataclasses
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mobilemix import __version__
from mobilemix.errors import InputError, MobilemixError, UnknownNameError
from mobilemix.quantization.options import EQUALIZATIONS, FORMATS, OBSERVERS, ROUNDINGS, Quantization
from mobilemix.recipe import (
    DEFAULT_MODEL,
    HARDWARE,
    INPUT_DTYPES,
    INPUT_KINDS,
    PRECISIONS,
    TARGETS_OF,
    Recipe,
    load_recipe,
)
from mobilemix.shims import SHIMS
from mobilemix.targets import TARGETS, require

if TYPE_CHECKING:
    from rich.table import Table

    from mobilemix.api import Export, Listener
    from mobilemix.evaluation import Evaluation, Share
    from mobilemix.parity import Parity

app = typer.Typer(
    name="mobilemix",
    help="Take FFT and state-space models to Core ML, ONNX, LiteRT and TensorRT, and prove that they arrived intact.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Weights = Annotated[Path | None, typer.Option(help="Checkpoint: safetensors, or a torch file of tensors.")]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        help="image, tensor, a shape such as 1x3x224x224, both (tensor:1x3x224x224), or a dtype with its shape"
        f" (int64:1x128; of {', '.join(INPUT_DTYPES)}); repeat for several inputs.",
    ),
]
Shims = Annotated[
    list[str] | None,
    typer.Option(help=f"Stand in for packages that need CUDA, while the model loads and runs: {', '.join(SHIMS)}."),
]
Calibration = Annotated[
    str | None,
    typer.Option(help="What 8-bit ranges are calibrated on: a folder of images, a .npy or .npz; builtin if left out."),
]
Samples = Annotated[int | None, typer.Option(help="At most so many of them; 128 if left out.")]
Seed = Annotated[int | None, typer.Option(help="Of the choice among more; 0 if left out.")]
ObserverName = Annotated[
    str | None, typer.Option("--observer", help=f"Which range 8 bits span: {', '.join(OBSERVERS)}.")
]
Format = Annotated[
    str | None,
    typer.Option("--format", help=f"Activations and weights of ONNX int8: {', '.join(FORMATS)}; u8s8 if left out."),
]
Equalization = Annotated[
    str | None, typer.Option(help=f"Scale channels to like ranges first: {', '.join(EQUALIZATIONS)}.")
]
BiasCorrection = Annotated[
    bool | None, typer.Option("--bias-correction", help="Let biases make up for the mean error of the weights.")
]
Rounding = Annotated[str | None, typer.Option(help=f"Of weights: {', '.join(ROUNDINGS)}.")]
Layers = Annotated[
    list[str] | None,
    typer.Option(
        "--layer",
        metavar="PATTERN=PRECISION",
        help="Another precision for layers whose name or module fits: 'stem*=float'; repeat it, the last counts.",
    ),
]
RecipeFile = Annotated[Path | None, typer.Option(help="TOML file with any of these; options override it.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command()
def export(
    model: Annotated[
        str | None,
        typer.Argument(
            help=f"A name from `mobilemix models`, file.py:factory or module:factory; {DEFAULT_MODEL} if left out.",
            show_default=False,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "-t", "--target", help=f"{', '.join(TARGETS)}; repeat it, or give a list: onnx,litert. coreml if left out."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the artifacts.")] = Path(),
    weights: Weights = None,
    precision: Annotated[
        str | None, typer.Option(help=f"{' or '.join(PRECISIONS)}; the target's default if left out.")
    ] = None,
    input_: Inputs = None,
    mean: Annotated[
        str | None, typer.Option(help="Normalisation of [0, 1] pixels, by channel: 0.485,0.456,0.406.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="Likewise: 0.229,0.224,0.225.")] = None,
    labels: Annotated[Path | None, typer.Option(help="File with one class name a line.")] = None,
    dynamic_batch: Annotated[
        str | None,
        typer.Option(
            metavar="MIN,OPT,MAX", help="Leave the batch open, between two sizes, at its best at a third: 1,8,64."
        ),
    ] = None,
    opset: Annotated[
        int | None, typer.Option(help="ONNX opset version; 18, or what the precision needs, if left out.")
    ] = None,
    minimum_ios: Annotated[
        int | None, typer.Option(help="Oldest iOS that must run the Core ML package; 16 if left out.")
    ] = None,
    shim: Shims = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative L2 error that passes; the precision's tier if left out.")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(metavar="MB", help="Scratch memory of a TensorRT engine; the builder's if left out.")
    ] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of kernel times that TensorRT's builder reads and writes.")
    ] = None,
    hardware_compatibility: Annotated[
        str | None, typer.Option(help=f"Other GPUs for a TensorRT engine: {', '.join(HARDWARE)}.")
    ] = None,
    version_compatible: Annotated[
        bool | None, typer.Option("--version-compatible", help="Let newer TensorRT 10 (or 11 …) run the engine.")
    ] = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seed: Seed = None,
    observer: ObserverName = None,
    format_: Format = None,
    equalization: Equalization = None,
    bias_correction: BiasCorrection = None,
    rounding: Rounding = None,
    layer: Layers = None,
    recipe: RecipeFile = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 -- `main` reads it: it must hold for errors in parsing too
) -> None:
    """Export a model, verify every artifact against PyTorch, and write its manifest."""
    base = load_recipe(recipe) if recipe else Recipe()
    options: dict[str, Any] = {
        "model": model,
        "weights": weights,
        "precision": precision,
        "mean": _numbers(mean),
        "std": _numbers(std),
        "labels": labels,
        "dynamic_batch": _integers(dynamic_batch),
        "opset": opset,
        "minimum_ios": minimum_ios,
        "shim": tuple(shim) if shim else None,
        "tolerance": tolerance,
        "workspace_mb": workspace,
        "timing_cache": timing_cache,
        "hardware_compatibility": hardware_compatibility,
        "version_compatible": version_compatible,
        "quantization": _quantization(
            base.quantization,
            data=calibration,
            samples=samples,
            seed=seed,
            observer=observer,
            format=format_,
            equalization=equalization,
            bias_correction=bias_correction,
            rounding=rounding,
            layers=_layers(layer),
        ),
        **_inputs(input_ or []),
    }
    given = {name: value for name, value in options.items() if value is not None}
    targets = list(dict.fromkeys(name.strip() for item in target or [base.target] for name in item.split(",")))
    recipes = [dataclasses.replace(base, target=name, **_fitting(given, name, targets)) for name in targets]

    for each in recipes:
        require(each.target)

    from mobilemix import api

    with _progress("Exporting") as listener:
        # Targets that cannot leave the batch open have a program of their own.
        distinct = {each.dynamic_batch: each for each in recipes}
        prepared = {batch: api.prepare(each, listener=listener) for batch, each in distinct.items()}
        exports = [api.deploy(prepared[each.dynamic_batch], each, output, listener=listener) for each in recipes]
    source = next(iter(prepared.values())).source
    if source.weights == "random":
        typer.echo(f"note: {source.name} has random weights; give a checkpoint with --weights", err=True)
    if json:
        from mobilemix.manifest import dumps

        typer.echo(dumps([{"path": one.path, "manifest": one.manifest} for one in exports]))
    else:
        for one in exports:
            _print_export(one)
    if not all(one.parity.passed for one in exports):
        raise typer.Exit(1)


@app.command()
def quantize(
    model: Annotated[
        str | None,
        typer.Argument(help=f"As of export; {DEFAULT_MODEL} if left out.", show_default=False),
    ] = None,
    target: Annotated[str | None, typer.Option("-t", "--target", help="As of export; onnx if left out.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the artifact, recipe and page.")] = Path(),
    weights: Weights = None,
    precision: Annotated[str | None, typer.Option(help="Of the layers that are quantised; int8 if left out.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="What the loss is measured on: a folder with a subfolder of images for each class, any folder of"
            " images, a .npy or .npz; what the ranges are calibrated on if left out."
        ),
    ] = None,
    data_samples: Annotated[int | None, typer.Option(help="At most so many of it; 512 if left out.")] = None,
    max_drop: Annotated[
        str, typer.Option(help="Largest loss of top-1, or of agreement with the float model where nothing is labelled.")
    ] = "0.5%",
    objective: Annotated[str, typer.Option(help="What is saved: latency or size.")] = "latency",
    calibration: Calibration = None,
    samples: Samples = None,
    seed: Seed = None,
    observer: ObserverName = None,
    format_: Format = None,
    equalization: Equalization = None,
    bias_correction: BiasCorrection = None,
    rounding: Rounding = None,
    layer: Layers = None,
    input_: Inputs = None,
    mean: Annotated[str | None, typer.Option(help="As of export.")] = None,
    std: Annotated[str | None, typer.Option(help="As of export.")] = None,
    opset: Annotated[int | None, typer.Option(help="As of export.")] = None,
    minimum_ios: Annotated[int | None, typer.Option(help="As of export.")] = None,
    shim: Shims = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative L2 error that passes; the precision's tier if left out.")
    ] = None,
    recipe: RecipeFile = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 -- as above
) -> None:
    """Quantise as many layers as a limit on the lost accuracy allows, and export that with a recipe and a report."""
    base = load_recipe(recipe) if recipe else Recipe(target="onnx")
    options: dict[str, Any] = {
        "model": model,
        "target": target,
        "weights": weights,
        "precision": precision or base.precision or "int8",
        "mean": _numbers(mean),
        "std": _numbers(std),
        "opset": opset,
        "minimum_ios": minimum_ios,
        "shim": tuple(shim) if shim else None,
        "tolerance": tolerance,
        "quantization": _quantization(
            base.quantization,
            data=calibration,
            samples=samples,
            seed=seed,
            observer=observer,
            format=format_,
            equalization=equalization,
            bias_correction=bias_correction,
            rounding=rounding,
            layers=_layers(layer),
        ),
        **_inputs(input_ or []),
    }
    asked = dataclasses.replace(base, **{name: value for name, value in options.items() if value is not None})
    limit = _share_of(max_drop)

    require(asked.target)

    from mobilemix import api

    with _progress("Quantising") as listener:
        found = api.quantize(
            output=output,
            data=data,
            samples=data_samples,
            max_drop=limit,
            objective=objective,
            listener=listener,
            **{field.name: getattr(asked, field.name) for field in dataclasses.fields(asked)},
        )
    made = found.export
    if json:
        from mobilemix.manifest import dumps

        paths = {"path": made.path, "recipe": found.recipe, "page": found.page}
        typer.echo(dumps({**paths, "report": found.report, "manifest": made.manifest}))
    else:
        from mobilemix.quantization.report import tables

        for table in tables(found.report):
            _console().print(table)
        _print_export(made)
        typer.echo(" · ".join((f"recipe {found.recipe}", *([f"report {found.page}"] if found.page else []))))
    if found.page is None:
        typer.echo("note: the report's page needs plotly; pip install 'mobilemix[report]'", err=True)
    if not made.parity.passed:
        raise typer.Exit(1)


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="A .mlpackage, .onnx or .tflite with its manifest beside it.")],
    model: Annotated[str | None, typer.Option(help="The source to compare with; the manifest's if left out.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Its checkpoint; the manifest's if left out.")] = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 -- as above
) -> None:
    """Verify an exported artifact again, from its manifest."""
    _refuse_engine(artifact)
    from mobilemix import api

    with _progress("Verifying") as listener:
        parity = api.verify(artifact, model=model, weights=weights, listener=listener)
    if json:
        from mobilemix.manifest import dumps

        typer.echo(dumps({"path": artifact, "passed": parity.passed, "parity": parity}))
    else:
        _console().print(_parity_table(parity))
        _verdict(artifact, parity, "")
    if not parity.passed:
        raise typer.Exit(1)


@app.command()
def evaluate(
    artifact: Annotated[Path, typer.Argument(help="A .mlpackage, .onnx or .tflite with its manifest beside it.")],
    dataset: Annotated[
        Path,
        typer.Argument(
            help="Folder with a subfolder of images for each class, any folder of images, or a .npy or .npz."
        ),
    ],
    samples: Annotated[int | None, typer.Option(help="At most so many, spread over all; all if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Of their choice.")] = 0,
    model: Annotated[str | None, typer.Option(help="The source to compare with; the manifest's if left out.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Its checkpoint; the manifest's if left out.")] = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 -- as above
) -> None:
    """Measure an artifact's accuracy, and its agreement with the float model that it was made from."""
    _refuse_engine(artifact)
    from mobilemix import api

    with _progress("Evaluating") as listener:
        found = api.evaluate(
            artifact, dataset, samples=samples, seed=seed, model=model, weights=weights, listener=listener
        )
    if json:
        from mobilemix.manifest import dumps

        typer.echo(dumps({"path": artifact, "dataset": dataset, "evaluation": found}))
        return
    if found.labelled == "order":
        typer.echo("note: no class folder is called as a label; they were taken in their order", err=True)
    for line in _evaluation(artifact, found):
        _console().print(line, soft_wrap=isinstance(line, str), markup=False)


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A name from `mobilemix models`, file.py:factory or module:factory; or a FILE.onnx,"
            f" FILE.tflite or PACKAGE.mlpackage, made by mobilemix or not; {DEFAULT_MODEL} if left out.",
            show_default=False,
        ),
    ] = "",
    weights: Weights = None,
    input_: Inputs = None,
    shim: Shims = None,
    recipe: RecipeFile = None,
    json: Json = False,
    debug: Debug = False,  # noqa: ARG001 -- as above
) -> None:
    """Say what stands between a model and each target, which pass handles it, and what the graph costs."""
    _refuse_engine(Path(model))
    base = load_recipe(recipe) if recipe else Recipe()
    options = {"model": model or None, "weights": weights, "shim": tuple(shim) if shim else None}
    given = {name: value for name, value in {**options, **_inputs(input_ or [])}.items() if value is not None}
    is_artifact = model.endswith((".onnx", ".tflite", ".mlpackage", ".mlpackage/"))
    if is_artifact and (recipe or given.keys() > {"model"}):
        raise InputError(f"{model} is an artifact, inspected as it is; leave out the options for models")

    from mobilemix import inspection
    from mobilemix.inspection.tables import describe

    with _progress("Inspecting") as listener:
        report = (
            inspection.inspect_artifact(Path(model))
            if is_artifact
            else inspection.inspect_model(dataclasses.replace(base, **given), listener=listener)
        )
    if json:
        from mobilemix.manifest import dumps

        typer.echo(dumps(report))
        return
    for line in describe(report):
        _console().print(line, soft_wrap=isinstance(line, str))


@app.command()
def models(json: Json = False, debug: Debug = False) -> None:  # noqa: ARG001 -- as above
    """List the models with what they cost, as mobilemix counts it and as their authors published it."""
    import torch

    from mobilemix.models.flops import count
    from mobilemix.models.registry import MODELS, build

    rows: list[dict[str, Any]] = []
    with _progress("Counting") as listener:
        for spec in MODELS.values():
            listener(spec.name)
            with torch.device("meta"):  # counting needs shapes, not weights
                model = build(spec)
            cost = count(model, (1, 3, spec.input_size, spec.input_size))
            rows.append(
                {
                    "name": spec.name,
                    "parameters": cost.parameters,
                    "published_parameters": spec.published_parameters and round(spec.published_parameters * 1e6),
                    "multiply_adds": cost.macs,
                    "published_multiply_adds": spec.published_gmacs and round(spec.published_gmacs * 1e9),
                    "input_size": spec.input_size,
                    "published_top1": spec.published_top1,
                    "paper": f"arXiv:{spec.family.paper}",
                }
            )
    if json:
        from mobilemix.manifest import dumps

        typer.echo(dumps(rows))
        return
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model")
    for heading in ("parameters (M)", "published", "multiply-adds (G)", "published", "input", "top-1 (%)"):
        table.add_column(heading, justify="right")
    table.add_column("paper")
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['published_parameters'] / 1e6:g}" if row["published_parameters"] else "–",
            f"{row['multiply_adds'] / 1e9:.3f}",
            f"{row['published_multiply_adds'] / 1e9:g}" if row["published_multiply_adds"] else "–",
            str(row["input_size"]),
            f"{row['published_top1']:.1f}" if row["published_top1"] else "–",
            row["paper"],
        )
    _console().print(table)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        typer.echo(f"mobilemix {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> NoReturn:
    """Entry point of the process, which it ends: `run`, without what Python does for programs that go on for longer."""
    gc.disable()  # the imports make 400 000 objects that stay: to look through them is a quarter of their time
    code = run()
    # What Python does at its end, but for taking torch apart object by object, for more than a second.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
    except (OSError, ValueError):  # nobody reads them any more, which Python reports with an exit code of its own
        sys.exit(code)
    os._exit(code)


def run() -> int:
    """Run the application; what goes wrong becomes one line on standard error and exit code 2."""
    usage_error: Any = typer.BadParameter.__base__  # the root of what the parser raises, under every typer
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, _interrupt)
    if "--debug" not in sys.argv:
        warnings.simplefilter("ignore")  # torch and coremltools warn of each other's deprecations
    try:
        code = app(standalone_mode=False)
    except (MobilemixError, usage_error, _Interrupted) as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"error: {_message(error)}", err=True)
        code = 2
    return code if isinstance(code, int) else 0


def _message(error: BaseException) -> str:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    return " ".join(text.split())


class _Interrupted(BaseException):
    """Unlike KeyboardInterrupt, which typer turns into an exit code of its own."""


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise _Interrupted("interrupted; nothing was written")


def _refuse_engine(path: Path) -> None:
    """An engine says nothing of itself; the file beside it, which has the manifest, says all."""
    if path.suffix == ".engine":
        raise InputError(f"{path} is an engine; give the file that it was built from, {path.with_suffix('.onnx')}")


def _fitting(given: dict[str, Any], target: str, targets: list[str]) -> dict[str, Any]:
    """The options for one of several targets, without those that only others of them have."""
    meant = {name: {*TARGETS_OF.get(name, targets)}.intersection(targets) for name in given}
    return {name: value for name, value in given.items() if target in meant[name] or not meant[name]}


def _quantization(base: Quantization, **options: Any) -> Quantization:
    """How to quantise, with the options that were given; of layers, these have the last word."""
    given = {name: value for name, value in options.items() if value is not None}
    layers = (*base.layers, *given.pop("layers", ()))
    return dataclasses.replace(base, **given, layers=layers)


def _layers(values: list[str] | None) -> tuple[tuple[str, str], ...] | None:
    """Read `--layer` values, PATTERN=PRECISION."""
    pairs = [value.rpartition("=") for value in values or []]
    if wrong := [value for value, (pattern, _, _) in zip(values or [], pairs, strict=True) if not pattern]:
        raise InputError(f"--layer {wrong[0]} is not PATTERN=PRECISION, such as 'stem*=float'")
    return tuple((pattern, precision) for pattern, _, precision in pairs) or None


def _inputs(values: list[str]) -> dict[str, Any]:
    """Read `--input` values: KIND, SHAPE or DTYPE:SHAPE, or a kind in front of these."""
    kinds: set[str] = set()
    shapes: list[tuple[int, ...]] = []
    dtypes: list[str] = []
    for value in values:
        dtype = shape = None
        for part in value.split(":"):
            sizes = part.lower().split("x")
            if part in INPUT_KINDS:
                kinds.add(part)
            elif part in INPUT_DTYPES:
                dtype = part
            elif shape is None and all(size.isdigit() for size in sizes):
                shape = tuple(map(int, sizes))
            elif part.isidentifier():
                raise UnknownNameError("kind or dtype of --input", part, (*INPUT_KINDS, *INPUT_DTYPES))
            else:
                raise InputError(
                    f"--input cannot be '{value}'; give image, tensor, a shape such as 1x3x224x224, or int64:1x128"
                )
        if shape:
            shapes.append(shape)
            dtypes.append(dtype or "float32")
        elif dtype:
            raise InputError(f"--input {value} needs a shape too, such as {dtype}:1x128")
    if len(kinds) > 1:
        raise InputError("--input is image or tensor, not both")
    given = {"input_shapes": tuple(shapes), "input_dtypes": tuple(dtypes)} if shapes else {}
    return {"input": next(iter(kinds), None), **given}


def _share_of(text: str) -> float:
    """Read a share, 0.5% or 0.005."""
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise InputError(f"--max-drop cannot be '{text}'; give a share such as 0.5% or 0.005") from None


def _numbers(text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"'{text}' is not a comma list of numbers, such as 0.485,0.456,0.406") from None


def _integers(text: str | None) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"'{text}' is not a comma list of whole numbers, such as 1,8,64") from None


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    # Into a pipe or a file, tables are as wide as they need to be.
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 160
    return Console(stderr=stderr, highlight=False, width=width)


@contextmanager
def _progress(title: str) -> Iterator["Listener"]:
    """A spinner with the stage and the time it has taken, on standard error, gone when the work is done.

    What the user's own code prints goes there too: standard output is for results, which may be JSON.
    """
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        Progress(*columns, console=_console(stderr=True), transient=True) as progress,
        redirect_stdout(sys.stderr),
    ):
        task = progress.add_task(title)
        yield lambda stage: progress.update(task, description=f"{title} · {stage}")


def _print_export(one: "Export") -> None:
    seconds = sum(one.manifest.seconds.values())
    _console().print(_parity_table(one.parity))
    _verdict(one.path, one.parity, f" · {one.manifest.artifact['bytes'] / 1e6:.2f} MB · {seconds:.1f} s")
    for name in one.manifest.build.get("files", {}):
        _console().print(_engine(one.path.with_name(name), one.manifest.build), soft_wrap=True, markup=False)


def _engine(path: Path, build: Mapping[str, Any]) -> str:
    """The line of an engine: where it is, its size, what built it and for what, and how it computes."""
    layers = ", ".join(f"{count} {precision}" for precision, count in build["layers"].items())
    facts = (f"{build['bytes'] / 1e6:.2f} MB", f"{build['seconds']:.1f} s", build["builder"], build["device"])
    return " · ".join((f"engine {path}", *facts, *([f"layers: {layers}"] if layers else [])))


def _verdict(path: Path, parity: "Parity", facts: str) -> None:
    """The target's own checks, and the closing line: path, size, time and parity."""
    from rich.markup import escape

    for check in parity.checks:
        held = {True: "[green]ok[/]", False: "[red]FAILED[/]", None: "not run"}[check.passed]
        _console().print(f"{held} {check.name}: {escape(check.detail)}", soft_wrap=True)
    worst = max(parity.agreement.values(), key=lambda one: one.relative_l2)
    mark = "[green]verified[/]" if parity.passed else "[red]FAILED[/]"
    samples = sum(one.samples for one in parity.agreement.values())
    same = round(sum(one.samples * one.top1 for one in parity.agreement.values()))
    match = f"relative error {worst.relative_l2:.1e} against {parity.reference} PyTorch · top-1 {same}/{samples}"
    _console().print(f"{mark} {escape(str(path))}{facts} · {match}", soft_wrap=True)
    if parity.departs:
        _console().print(f"  first departure: {parity.departs}", soft_wrap=True, markup=False)


def _evaluation(artifact: Path, found: "Evaluation") -> "Iterator[Table | str]":
    """A table of the accuracies, how the two models compare, and the closing line: path, samples, agreement, time."""
    from rich.table import Table

    def stated(share: "Share") -> str:
        return f"{share.value:.1%} ({share.low:.1%} to {share.high:.1%})"

    if found.top1 and found.float_top1:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("", "top-1 (95%)", *(["top-5 (95%)"] if found.top5 else [])):
            table.add_column(heading)
        for name, shares in (
            ("artifact", (found.top1, found.top5)),
            ("float PyTorch", (found.float_top1, found.float_top5)),
        ):
            table.add_row(name, *(stated(share) for share in shares if share))
        yield table
    if found.paired:
        pair = found.paired
        yield (
            f"difference {pair.difference * 100:+.1f} points ({pair.low * 100:+.1f} to {pair.high * 100:+.1f}) · right:"
            f" both {pair.both}, artifact only {pair.artifact_only}, float only {pair.float_only}, neither"
            f" {pair.neither} · McNemar p {pair.p:.2g}"
        )
    agreement = f"same first class {stated(found.agreement)} · " if found.agreement else ""
    skipped = f", {found.skipped} skipped" if found.skipped else ""
    yield (
        f"evaluated {artifact} · {found.samples} samples{skipped} · {agreement}mean cosine {found.cosine:.6f} · "
        f"{found.seconds * 1000:.1f} ms each"
    )


def _parity_table(parity: "Parity") -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("inputs", "samples", "max error", "mean error", "relative L2", "1 − cosine", "top-1"):
        table.add_column(heading, justify="left" if heading == "inputs" else "right")
    for name, one in parity.agreement.items():
        table.add_row(
            name,
            str(one.samples),
            f"{one.max_abs:.1e}",
            f"{one.mean_abs:.1e}",
            f"{one.relative_l2:.1e}",
            f"{max(0.0, 1 - one.cosine):.1e}",
            f"{one.top1:.0%}",
        )
    return table
