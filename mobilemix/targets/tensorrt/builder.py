"""From an ONNX file to an engine: NVIDIA's parser and builder, each call in a process of its own.

A model that is refused can bring that code down, and a large one can fill memory; the process that exports survives
both, and what native code prints is kept in a log. Where the `tensorrt` package is missing, `trtexec` builds instead.

Not run on hardware: building with TensorRT (the package and `trtexec`) needs a GPU. TensorRT for RTX needs none, has
the same parser and API, and its builds are tested.
"""

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import onnx

from mobilemix.errors import InputError, MobilemixError, TargetError
from mobilemix.targets.tensorrt import bindings, trtexec
from mobilemix.targets.tensorrt.bindings import Flavour

NAMES: dict[Flavour, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
Profile = dict[str, tuple[tuple[int, ...], ...]]
"""By input, its smallest, most frequent and largest shape."""

PARSE_SECONDS = 600
_WORKER = "mobilemix.targets.tensorrt.worker"

_LACKS: dict[Flavour, dict[str, str]] = {
    "tensorrt": {"compute_capabilities": "it builds for the GPU that it runs on; see hardware compatibility"},
    "tensorrt-rtx": {
        "timing_cache": "it times nothing when it builds; its kernels are compiled, and cached, where it runs",
        "hardware_compatibility": "its engines run on compute capability 8.0 and later as they are",
        "version_compatible": "its package has no lean runtime; build again for another version",
    },
}
"""Options that a flavour does not have, and what it has in their place."""


@dataclasses.dataclass(frozen=True)
class BuildOptions:
    """What to ask of the builder; see `_LACKS` for what not every flavour has.

    Attributes:
        workspace_mb: memory that kernels may use as scratch, MiB; None leaves it to the builder.
        timing_cache: file of measured kernel times, read if it is there and written after the build.
        hardware_compatibility: other GPUs that the engine must run on.
        version_compatible: whether newer TensorRT of the same major version must run the engine.
        batch: smallest, most frequent and largest batch of a model whose first axis is dynamic.
        compute_capabilities: GPUs to build for ("sm75", "sm89" …); empty is every one since 8.0.
        timeout: seconds after which a build is given up.
    """

    workspace_mb: int | None = None
    timing_cache: Path | None = None
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    version_compatible: bool = False
    batch: tuple[int, int, int] | None = None
    compute_capabilities: tuple[str, ...] = ()
    timeout: float = 3600.0

    def check(self, flavour: Flavour) -> None:
        """Raise InputError for an option that the flavour lacks."""
        default = BuildOptions()
        for name, instead in _LACKS[flavour].items():
            if getattr(self, name) != getattr(default, name):
                raise InputError(f"{NAMES[flavour]} has no {name.replace('_', ' ')}: {instead}")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of the parsed network: its name (that of the ONNX node), type and the precision that it computes in."""

    name: str
    type: str
    precision: str


@dataclasses.dataclass(frozen=True)
class Built:
    """A finished engine.

    Attributes:
        engine: its file.
        seconds: of the build alone, without starting and parsing.
        bytes: of the file.
        builder: name and version of what built it.
        layers: of the network, without constants and arithmetic on shapes; none from `trtexec`, which does not tell.
    """

    engine: Path
    seconds: float
    bytes: int
    builder: str
    layers: tuple[Layer, ...]


@dataclasses.dataclass(frozen=True)
class Refusal:
    """An ONNX node that the parser does not take: its name, operator, and the parser's reason."""

    node: str
    operator: str
    reason: str


class Refused(TargetError):  # noqa: N818 -- the field says "refused", and so do messages
    """The parser does not take the model; `refusals` are the nodes in its way."""

    def __init__(self, name: str, refusals: tuple[Refusal, ...]) -> None:
        """Name the first node, and how many there are."""
        first = refusals[0]
        others = f", and {len(refusals) - 1} other nodes" if len(refusals) > 1 else ""
        place = f"node {first.node} ({first.operator}){others}" if first.node or first.operator else "the model"
        super().__init__(f"{name} refuses {place}: {first.reason}")
        self.refusals = refusals


def can_build(flavour: Flavour) -> str | None:
    """None if `build` can be tried here, or why not."""
    if flavour == "tensorrt-rtx":
        try:
            bindings.rtx_libraries()
        except MobilemixError as error:
            return str(error)
        return None
    if not _has_package() and trtexec.find() is None:
        return "neither the Python package tensorrt nor trtexec is installed; pip install 'mobilemix[tensorrt]'"
    return bindings.missing_gpu()


def parse(model: Path, flavour: Flavour) -> tuple[Refusal, ...]:
    """What the parser has against a model; empty if it takes it.

    Raises:
        MissingDependencyError: the flavour's package is not installed.
        TargetError: the parser crashed.
    """
    with tempfile.TemporaryDirectory() as folder:
        request: dict[str, Any] = {"model": str(model.resolve()), "engine": None, "options": {}, "profile": {}}
        return _refusals(_work(request, flavour, Path(folder) / "log", PARSE_SECONDS))


def build(model: Path, engine: Path, log: Path, flavour: Flavour, options: BuildOptions) -> Built:
    """Parse and build; `log` is written in any case.

    Raises:
        InputError: an option that the flavour lacks, or that does not fit the model.
        MissingDependencyError: the flavour's package is not installed.
        Refused: the parser does not take the model.
        TargetError: the builder failed, crashed, or ran out of time or memory.
    """
    options.check(flavour)
    profile = profile_of(model, options.batch)
    if flavour == "tensorrt" and not _has_package() and (program := trtexec.find()):
        return _with_trtexec(trtexec.arguments(program, model, engine, options, profile), engine, log, options.timeout)
    cache = str(options.timing_cache.resolve()) if options.timing_cache else None
    request = {
        "model": str(model.resolve()),
        "engine": str(engine.resolve()),
        "options": dataclasses.asdict(options) | {"timing_cache": cache},
        "profile": profile,
    }
    result = _work(request, flavour, log, options.timeout)
    if refusals := _refusals(result):
        raise Refused(NAMES[flavour], refusals)
    layers = tuple(Layer(*layer) for layer in result["layers"])
    return Built(engine, result["seconds"], engine.stat().st_size, result["builder"], layers)


def _with_trtexec(command: list[str], engine: Path, log: Path, timeout: float) -> Built:
    engine.unlink(missing_ok=True)
    began = time.perf_counter()
    _run(command, "", log, timeout, "trtexec")
    seconds = time.perf_counter() - began
    if not engine.exists():
        raise TargetError(f"trtexec wrote no engine; {_complaint(log)}")
    return Built(engine, seconds, engine.stat().st_size, trtexec.version(log), ())


def _has_package() -> bool:
    return importlib.util.find_spec("tensorrt") is not None


def profile_of(model: Path, batch: tuple[int, int, int] | None) -> Profile:
    """The shapes that a model whose first axis is dynamic has to be built for; empty for any other."""
    shapes = {
        value.name: [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]
        for value in onnx.load(model, load_external_data=False).graph.input
    }
    free = {name for name, shape in shapes.items() if -1 in shape}
    if bool(free) != bool(batch):
        raise InputError(
            f"{model.name} has a fixed batch, so it takes no --dynamic-batch"
            if batch
            else f"the shape of {', '.join(sorted(free))} in {model.name} is dynamic; say --dynamic-batch min,opt,max"
        )
    if stuck := [name for name in free if -1 in shapes[name][1:]]:
        raise InputError(f"more than the batch of {', '.join(sorted(stuck))} in {model.name} is dynamic")
    return {name: tuple((size, *shapes[name][1:]) for size in batch or ()) for name in sorted(free)}


def _refusals(result: dict[str, Any]) -> tuple[Refusal, ...]:
    return tuple(Refusal(*refusal) for refusal in result["refusals"])


def _work(request: dict[str, Any], flavour: Flavour, log: Path, timeout: float) -> dict[str, Any]:
    """What the worker answers; raises as `build` does, but for Refused."""
    if flavour == "tensorrt-rtx":
        bindings.rtx_libraries()  # raises here what says how to install it
    elif not _has_package():
        bindings.tensorrt()
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, "-P", "-m", _WORKER, str(answer)]
        _run(command, json.dumps(request | {"flavour": flavour}), log, timeout, NAMES[flavour])
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if (error := result.get("error")) is not None:
        raise TargetError(f"{NAMES[flavour]} failed: {'; '.join(filter(None, (error, _complaint(log))))}")
    return result


def _run(command: list[str], text: str, log: Path, timeout: float, name: str) -> None:
    """Run a process whose output goes to `log`; any end but a good one is a TargetError."""
    # `-P` keeps modules of the folder that the user is in from being imported, so ours has to be named.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH"))))
    try:
        with log.open("wb") as stream:
            done = subprocess.run(  # noqa: S603 -- a list of arguments, no shell
                command,
                input=text,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                env=os.environ | {"PYTHONPATH": path},
                encoding="utf-8",
            )
    except subprocess.TimeoutExpired:
        raise TargetError(f"{name} took longer than {timeout:g} s and was stopped; {_complaint(log)}") from None
    if done.returncode == -signal.SIGKILL:
        raise TargetError(f"{name} was killed, most often because memory ran out; {_complaint(log)}")
    if done.returncode < 0:
        raise TargetError(f"{name} crashed ({signal.Signals(-done.returncode).name}); {_complaint(log)}")
    if done.returncode:
        raise TargetError(f"{name} failed with exit code {done.returncode}; {_complaint(log)}")


def _complaint(log: Path) -> str:
    """The first error in a log, else its last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.split("[E]", 1)[1].strip() for line in lines if "[E]" in line]
    return f"its log says: {(errors or lines[-1:] or ['nothing'])[0]}"
