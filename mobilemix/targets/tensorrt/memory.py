"""Memory of the GPU that an engine reads and writes, on one stream: PyTorch's where it has CUDA, else CUDA's own.

Not run on hardware: both need a GPU.
"""

import importlib
import importlib.util
from typing import Any, Protocol

import numpy as np
import torch

from mobilemix.errors import MissingDependencyError, TargetError
from mobilemix.targets.base import Array


class Buffer(Protocol):
    """Some bytes on the GPU, freed with the object."""

    @property
    def address(self) -> int:
        """Where they begin."""


class Memory(Protocol):
    """Allocates, and copies in the order of a stream."""

    stream: int
    """Handle of the CUDA stream, for TensorRT."""

    def empty(self, nbytes: int) -> Buffer:
        """Allocate, with any content."""

    def put(self, array: Array) -> Buffer:
        """Copy a contiguous array to a new buffer."""

    def get(self, buffer: Buffer, array: Array) -> None:
        """Copy a buffer to a contiguous array, once all that the stream was given before is done."""

    def wait(self) -> None:
        """Return when all that the stream was given is done."""


def memory() -> Memory:
    """That of the first GPU.

    Raises:
        MissingDependencyError: PyTorch has no CUDA here, and there is no cuda-bindings.
        TargetError: CUDA fails.
    """
    if torch.cuda.is_available():
        return TorchMemory()
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        raise MissingDependencyError("cuda-bindings", "running an engine with a PyTorch that has no CUDA", "tensorrt")
    return CudaMemory()


class TorchMemory:
    """Through `torch.cuda`, whose context and allocator the process may have in use already."""

    class _Buffer:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            self.address = tensor.data_ptr()

    def __init__(self) -> None:
        """Make a stream: on the default one, TensorRT would synchronise more than it needs to."""
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.stream = int(self._stream.cuda_stream)

    def empty(self, nbytes: int) -> Buffer:
        """See `Memory`."""
        with torch.cuda.stream(self._stream):
            return self._Buffer(torch.empty(max(nbytes, 1), dtype=torch.uint8, device="cuda"))

    def put(self, array: Array) -> Buffer:
        """See `Memory`."""
        with torch.cuda.stream(self._stream):
            return self._Buffer(torch.from_numpy(_bytes(array)).cuda())

    def get(self, buffer: Buffer, array: Array) -> None:
        """See `Memory`."""
        assert isinstance(buffer, self._Buffer)
        with torch.cuda.stream(self._stream):
            _bytes(array)[:] = buffer.tensor[: array.nbytes].cpu().numpy()

    def wait(self) -> None:
        """See `Memory`."""
        self._stream.synchronize()


class CudaMemory:
    """Through `cuda.bindings.runtime`, which needs nothing but the driver."""

    class _Buffer:
        def __init__(self, runtime: Any, address: int) -> None:
            self._runtime = runtime
            self.address = address

        def __del__(self) -> None:
            self._runtime.cudaFree(self.address)

    def __init__(self) -> None:
        """Make a stream; raises TargetError where there is no driver or GPU."""
        self._runtime = importlib.import_module("cuda.bindings.runtime")
        self._handle = self._call("cudaStreamCreate")
        self.stream = int(self._handle)

    def empty(self, nbytes: int) -> Buffer:
        """See `Memory`."""
        return self._Buffer(self._runtime, int(self._call("cudaMalloc", max(nbytes, 1))))

    def put(self, array: Array) -> Buffer:
        """See `Memory`."""
        buffer = self.empty(array.nbytes)
        self._copy(buffer.address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
        return buffer

    def get(self, buffer: Buffer, array: Array) -> None:
        """See `Memory`."""
        self._copy(array.ctypes.data, buffer.address, array.nbytes, "cudaMemcpyDeviceToHost")

    def wait(self) -> None:
        """See `Memory`."""
        self._call("cudaStreamSynchronize", self._handle)

    def _copy(self, destination: int, source: int, nbytes: int, kind: str) -> None:
        """Wait, too, so that the array on this side need not outlive the call."""
        kinds = self._runtime.cudaMemcpyKind
        self._call("cudaMemcpyAsync", destination, source, nbytes, getattr(kinds, kind), self._handle)
        self.wait()

    def _call(self, name: str, *arguments: Any) -> Any:
        """Every function of the runtime returns its status first, then what it made."""
        status, *values = getattr(self._runtime, name)(*arguments)
        if status != self._runtime.cudaError_t.cudaSuccess:
            text = self._runtime.cudaGetErrorString(status)[1].decode()
            raise TargetError(f"CUDA failed in {name}: {text}")
        return values[0] if values else None


def _bytes(array: Array) -> Array:
    return array.reshape(-1).view(np.uint8)
