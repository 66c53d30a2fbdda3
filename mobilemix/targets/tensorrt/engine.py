"""TensorRT engines, executed.

Not run on hardware: everything here past the error messages needs an NVIDIA GPU. It is written to NVIDIA's API
reference of versions 10 and 11 (names of tensors, `set_input_shape`, `execute_async_v3`), and its tests put an engine
of numpy in the place of TensorRT's.
"""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mobilemix.errors import InputError, TargetError
from mobilemix.targets.base import Array, Inputs
from mobilemix.targets.tensorrt import bindings
from mobilemix.targets.tensorrt.memory import Buffer, memory

DTYPES: dict[str, Any] = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
"""NumPy's types, by TensorRT's names of those that an input or output may have."""


class EngineRunner:
    """An engine on the first GPU (see `mobilemix.targets.base.Runner`)."""

    def __init__(self, path: Path, *, host_code: bool = False) -> None:
        """Read the engine and prepare to execute it.

        Args:
            path: its file.
            host_code: whether the file may bring code for the CPU, as version-compatible engines do; only for a file
                from a source that is trusted.

        Raises:
            InputError: no such file, not an engine, or one for another GPU or version.
            MissingDependencyError: TensorRT is not installed.
            TargetError: there is no GPU.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror}") from error
        found = bindings.tensorrt()
        if reason := bindings.missing_gpu():
            raise TargetError(f"{path.name} cannot be executed here: {reason}")
        self._trt = found.module
        self._log = bindings.quiet_logger(found.module)  # must outlive what is made with it
        found.module.init_libnvinfer_plugins(self._log, "")
        self._runtime = found.module.Runtime(self._log)
        if host_code:
            self._runtime.engine_host_code_allowed = True
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            why = self._log.errors[0] if self._log.errors else "no reason given"
            raise InputError(f"{found.name} {found.version} cannot load {path.name} on this GPU: {why}")
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise TargetError(f"the GPU has no room for {path.name}: {'; '.join(self._log.errors[:1])}")
        self._memory = memory()
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        is_input = {name: self._engine.get_tensor_mode(name) == found.module.TensorIOMode.INPUT for name in names}
        self._inputs = [name for name in names if is_input[name]]
        self._outputs = [name for name in names if not is_input[name]]
        self._one_at_a_time = threading.Lock()

    def run(self, inputs: Inputs) -> dict[str, Array]:
        """Execute; outputs by name, float32.

        Raises:
            InputError: the inputs' names or shapes are not the engine's, or outside its optimisation profile.
            TargetError: the GPU failed.
        """
        with self._one_at_a_time:
            buffers = self._bind(inputs)
            self._execute()
            outputs = {}
            for name in self._outputs:
                array = np.empty(tuple(self._context.get_tensor_shape(name)), self._dtype(name))
                self._memory.get(buffers[name], array)
                outputs[name] = np.asarray(array, np.float32)
        return outputs

    def values(self, inputs: Inputs) -> Iterator[tuple[str, Array]]:
        """The outputs, since an engine has no other value that can be read: its layers are fused."""
        yield from self.run(inputs).items()

    def latencies(self, inputs: Inputs, count: int) -> list[float]:
        """Milliseconds of `count` executions, one after the other, with inputs and outputs on the GPU."""
        found = []
        with self._one_at_a_time:
            buffers = self._bind(inputs)
            for _ in range(count):
                self._memory.wait()
                start = time.perf_counter()
                self._execute()
                self._memory.wait()
                found.append(1e3 * (time.perf_counter() - start))
            del buffers
        return found

    def _bind(self, inputs: Inputs) -> dict[str, Buffer]:
        """Tell the context where its inputs are, and where to put its outputs; the buffers have to be kept."""
        if set(inputs) != set(self._inputs):
            raise InputError(f"the engine takes {', '.join(self._inputs)}, not {', '.join(inputs)}")
        buffers = {}
        for name in self._inputs:
            array = np.array(inputs[name], self._dtype(name), order="C")
            if not self._context.set_input_shape(name, array.shape):
                wanted = tuple(self._engine.get_tensor_shape(name))
                raise InputError(f"the engine takes {name} {wanted}, −1 within its profile; not {array.shape}")
            buffers[name] = self._memory.put(array)
        for name in self._outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            buffers[name] = self._memory.empty(int(np.prod(shape)) * np.dtype(self._dtype(name)).itemsize)
        for name, buffer in buffers.items():
            self._context.set_tensor_address(name, buffer.address)
        return buffers

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._memory.stream):
            raise TargetError(f"the GPU failed: {self._log.errors[-1] if self._log.errors else 'no reason given'}")

    def _dtype(self, name: str) -> Any:
        return DTYPES[self._engine.get_tensor_dtype(name).name]
