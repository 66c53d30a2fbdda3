"""Engines of TensorRT for RTX, executed by ONNX Runtime's plugin execution provider.

The provider takes an engine in an ONNX model of one node, `EPContext` (ONNX Runtime's design of that name), whose
inputs and outputs are those of the model that the engine was built from: the `.onnx` file beside it.

Not run on hardware: the provider's library does not even load without NVIDIA's driver. The attributes of the node are
those that its source reads and writes.
"""

import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from mobilemix.errors import InputError, TargetError, first_line
from mobilemix.targets.base import Array, Inputs
from mobilemix.targets.onnx.runtime import read_model
from mobilemix.targets.tensorrt import bindings

PROVIDER = "NvTensorRTRTXExecutionProvider"
_DOMAIN = "com.microsoft"
_FATAL_ONLY = 4


class RtxRunner:
    """An engine on an RTX GPU (see `mobilemix.targets.base.Runner`)."""

    def __init__(self, path: Path) -> None:
        """Read the engine, and the `.onnx` file beside it, and prepare to execute it.

        Raises:
            InputError: no such files, or not an engine of the installed version.
            MissingDependencyError: TensorRT for RTX is not installed.
            TargetError: there is no RTX GPU.
        """
        content = wrap(path, path.with_suffix(".onnx"))
        device = find_device()
        options = ort.SessionOptions()
        options.log_severity_level = _FATAL_ONLY
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        options.add_provider_for_devices([device], {})
        try:
            self._session = ort.InferenceSession(content, options)
        except Exception as error:
            raise InputError(f"ONNX Runtime cannot load {path.name} on this GPU: {first_line(error)}") from error

    def run(self, inputs: Inputs) -> dict[str, Array]:
        """Execute; outputs by name, float32.

        Raises:
            InputError: the inputs' names or shapes are not the engine's.
        """
        names = [output.name for output in self._session.get_outputs()]
        try:
            values = self._session.run(names, dict(inputs))
        except Exception as error:
            raise InputError(f"the engine does not take these inputs: {first_line(error)}") from error
        return {name: np.asarray(value, np.float32) for name, value in zip(names, values, strict=True)}

    def values(self, inputs: Inputs) -> Iterator[tuple[str, Array]]:
        """The outputs, since an engine has no other value that can be read: its layers are fused."""
        yield from self.run(inputs).items()


def wrap(engine: Path, model: Path) -> bytes:
    """An ONNX model of one node that holds the engine, with the inputs and outputs of the model that it was built from.

    Raises:
        InputError: no such file, or not an engine of the installed version.
        MissingDependencyError, TargetError: as `bindings.rtx`.
    """
    source = read_model(model).graph
    try:
        content = engine.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {engine}: {error.strerror}") from error
    _check(content, engine.name)
    node = onnx.helper.make_node(
        "EPContext",
        [value.name for value in source.input],
        [value.name for value in source.output],
        name=engine.stem,
        domain=_DOMAIN,
        embed_mode=1,  # the engine itself, not its path
        ep_cache_context=content,
        main_context=0,  # this provider shares no engine between nodes
        partition_name=engine.stem,
        onnx_model_filename=model.name,
        source=PROVIDER,
    )
    graph = onnx.helper.make_graph([node], engine.stem, source.input, source.output)
    domains = [onnx.helper.make_opsetid(_DOMAIN, 1), onnx.helper.make_opsetid("", 18)]
    wrapped: bytes = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    return wrapped


@functools.cache
def find_device() -> Any:
    """The first GPU that the provider offers.

    Raises:
        TargetError: there is none, or the provider does not load.
    """
    if reason := bindings.missing_gpu():
        raise TargetError(f"an engine of TensorRT for RTX cannot be executed here: {reason}")
    bindings.rtx_libraries()
    package = importlib.import_module(bindings.RTX_MODULE)
    try:
        ort.register_execution_provider_library(PROVIDER, package.get_library_path())
    except Exception as error:
        raise TargetError(f"ONNX Runtime cannot load {PROVIDER}: {first_line(error)}") from error
    devices = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    if not devices:
        raise TargetError(
            "TensorRT for RTX runs on RTX GPUs (compute capability 8.6, 8.9 or 12.0 and later); none here"
        )
    return devices[0]


def _check(content: bytes, name: str) -> None:
    """Refuse what does not begin as an engine does; what the GPU makes of it is another question."""
    trt = bindings.rtx().module
    log = bindings.quiet_logger(trt)
    runtime = trt.Runtime(log)
    _, diagnostics = runtime.get_engine_validity(content[: runtime.engine_header_size])
    if len(content) < runtime.engine_header_size or diagnostics & int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE):
        raise InputError(f"{name} is not an engine of TensorRT for RTX, or it is cut short")
    if diagnostics & int(trt.EngineInvalidityDiagnostics.VERSION_MISMATCH):
        raise InputError(f"{name} was built by another version of TensorRT for RTX; export the model again")
