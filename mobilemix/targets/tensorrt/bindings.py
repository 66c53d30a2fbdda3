"""NVIDIA's own Python bindings, found and checked: of TensorRT, and of TensorRT for RTX.

Both have one API (Builder, OnnxParser, Runtime …). Those of TensorRT for RTX are published without the libraries that
they bind; the package of its ONNX Runtime execution provider bundles these, so the two together are enough to parse
and build, and no GPU is needed.
"""

import ctypes
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from mobilemix.errors import MissingDependencyError, TargetError, first_line

Flavour = Literal["tensorrt", "tensorrt-rtx"]
"""Named as the targets and the extras are."""

OLDEST = 10
"""Major version of TensorRT since which tensors have names and networks are strongly typed."""

RTX_MODULE = "onnxruntime_ep_nv_tensorrt_rtx"
RTX_LIBRARIES = "onnxruntime-ep-nv-tensorrt-rtx-cu13"
RTX_BINDINGS = "tensorrt-rtx-cu13-bindings"
_DRIVER = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@dataclasses.dataclass(frozen=True)
class Bindings:
    """An imported builder and parser.

    Attributes:
        name: "TensorRT" or "TensorRT for RTX".
        version: as its makers number it.
        module: its Python API.
    """

    name: str
    version: str
    module: ModuleType


def load(flavour: Flavour) -> Bindings:
    """Import the bindings of a flavour; raises as `tensorrt` and `rtx` do."""
    loaders: dict[Flavour, Callable[[], Bindings]] = {"tensorrt": tensorrt, "tensorrt-rtx": rtx}
    return loaders[flavour]()


def tensorrt() -> Bindings:
    """Import TensorRT.

    Raises:
        MissingDependencyError: the package is not installed.
        TargetError: it does not load, or is too old.
    """
    if importlib.util.find_spec("tensorrt") is None:
        raise MissingDependencyError("tensorrt", "building a TensorRT engine", "tensorrt")
    module = _import("tensorrt", "TensorRT")
    if int(module.__version__.split(".")[0]) < OLDEST:
        raise TargetError(f"TensorRT {module.__version__} is too old; install {OLDEST} or newer")
    return Bindings("TensorRT", module.__version__, module)


def rtx() -> Bindings:
    """Import TensorRT for RTX over the libraries that its execution provider bundles.

    Raises as `rtx_libraries` does.
    """
    for library in rtx_libraries():
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # the bindings find them by name among what is loaded
    module = _import("tensorrt_rtx_bindings", "TensorRT for RTX")
    return Bindings("TensorRT for RTX", module.__version__, module)


def rtx_libraries() -> tuple[Path, Path]:
    """The builder's and the parser's library, in the order to load them; they fit the installed bindings.

    Raises:
        MissingDependencyError: one of the two packages is not installed.
        TargetError: their versions differ, or the libraries are not those of this platform.
    """
    spec = importlib.util.find_spec(RTX_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingDependencyError(RTX_LIBRARIES, "TensorRT for RTX", "tensorrt-rtx")
    try:
        bindings = importlib.metadata.version(RTX_BINDINGS)
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependencyError(RTX_BINDINGS, "TensorRT for RTX", "tensorrt-rtx") from None
    folder = Path(spec.submodule_search_locations[0])
    builder, parser = (_library(folder, stem) for stem in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"))
    libraries = builder.name.split(".so.")[1]
    if libraries.split(".")[:2] != bindings.split(".")[:2]:
        wanted = ".".join(libraries.split(".")[:2])
        raise TargetError(
            f"{RTX_LIBRARIES} bundles TensorRT for RTX {libraries}, but {RTX_BINDINGS} is {bindings}; "
            f"pip install '{RTX_BINDINGS}=={wanted}.*'"
        )
    return builder, parser


def missing_gpu() -> str | None:
    """Why nothing can run on an NVIDIA GPU here, or None if it can; asks the driver and keeps nothing of it."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return "no NVIDIA driver"
    count = ctypes.c_int()
    if status := driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return f"the NVIDIA driver reports error {status}"
    return None if count.value else "no NVIDIA GPU"


def quiet_logger(trt: Any) -> Any:
    """A logger that keeps errors, in its list `errors`, and prints nothing; for the API `trt` of either flavour."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # `super()` does not reach the part that C++ sees
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()


def gpu_name() -> str:
    """What the driver calls the first GPU, where `missing_gpu` says that there is one."""
    text = ctypes.create_string_buffer(256)
    status = ctypes.CDLL(_DRIVER).cuDeviceGetName(text, len(text), 0)
    return "an NVIDIA GPU" if status else text.value.decode(errors="replace")


def _library(folder: Path, stem: str) -> Path:
    """The versioned file; the package adds shorter links to it once it has been imported."""
    found = sorted(folder.glob(f"{stem}.so.*"), key=lambda path: len(path.name))
    if not found:
        raise TargetError(f"{RTX_LIBRARIES} has no {stem}.so here; TensorRT for RTX is used on Linux only")
    return found[-1]


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise TargetError(f"{name} is installed but does not load: {first_line(error)}") from error
