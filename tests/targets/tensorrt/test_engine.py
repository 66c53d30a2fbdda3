import ctypes
import enum
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tensorrt_graphs import needs_rtx

from mobilemix.errors import InputError, MissingDependencyError, TargetError
from mobilemix.targets.tensorrt import bindings, engine, memory
from mobilemix.targets.tensorrt.engine import EngineRunner

STREAM = 7
LARGEST = 4
"""Batch of the stand-in's profile."""


class Type(enum.Enum):
    FLOAT = 0
    HALF = 1


class Context:
    """Adds 1 to x, of a dynamic batch, and answers in float16, through addresses as TensorRT does."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.fails = False

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "x"
        self.shape = tuple(shape)
        return shape[0] <= LARGEST and tuple(shape[1:]) == (3,)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == STREAM
        if self.fails:
            LOGS[-1].log(Log.Severity.ERROR, "out of memory")
            return False
        self._array("y", np.float16)[:] = self._array("x", np.float32) + 1
        return True

    def _array(self, name: str, dtype: type) -> np.ndarray:
        count = int(np.prod(self.shape))
        kind = ctypes.c_char * (count * np.dtype(dtype).itemsize)
        return np.frombuffer(kind.from_address(self.addresses[name]), dtype).reshape(self.shape)


class Engine:
    num_io_tensors = 2

    def __init__(self) -> None:
        self.context = Context()

    def get_tensor_name(self, index: int) -> str:
        return ("x", "y")[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == "x" else "output"

    def get_tensor_dtype(self, name: str) -> Type:
        return Type.FLOAT if name == "x" else Type.HALF

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3)

    def create_execution_context(self) -> Context:
        return self.context


class Log:
    class Severity(enum.Enum):
        INTERNAL_ERROR = 0
        ERROR = 1
        INFO = 3

    def __init__(self) -> None:
        LOGS.append(self)


LOGS: list[Any] = []


class Runtime:
    def __init__(self, logger: Log) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, content: bytes) -> Engine | None:
        if content == b"engine":
            return Engine()
        self.logger.log(Log.Severity.INFO, "loading")
        self.logger.log(Log.Severity.ERROR, "magic tag does not match")
        return None


class HostMemory:
    """Arrays of this side, whose addresses the stand-in's context can follow."""

    stream = STREAM

    class Buffer:
        def __init__(self, content: np.ndarray) -> None:
            self.content = content
            self.address = content.ctypes.data

    def empty(self, nbytes: int) -> Buffer:
        return self.Buffer(np.zeros(nbytes, np.uint8))

    def put(self, array: np.ndarray) -> Buffer:
        return self.Buffer(array.copy())

    def get(self, buffer: Buffer, array: np.ndarray) -> None:
        array.reshape(-1).view(np.uint8)[:] = buffer.content[: array.nbytes]

    def wait(self) -> None:
        pass


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EngineRunner]:
    trt = SimpleNamespace(
        ILogger=Log,
        Runtime=Runtime,
        TensorIOMode=SimpleNamespace(INPUT="input"),
        init_libnvinfer_plugins=lambda logger, namespace: True,
    )
    monkeypatch.setattr(bindings, "tensorrt", lambda: bindings.Bindings("TensorRT", "10.3.0", trt))  # type: ignore[arg-type]
    monkeypatch.setattr(bindings, "missing_gpu", lambda: None)
    monkeypatch.setattr(engine, "memory", HostMemory)
    (tmp_path / "small.engine").write_bytes(b"engine")
    yield EngineRunner(tmp_path / "small.engine")
    LOGS.clear()


@pytest.mark.parametrize("batch", [1, LARGEST])
def test_inputs_go_in_and_outputs_come_back_in_float32(batch: int, runner: EngineRunner) -> None:
    x = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3)
    for inputs in ({"x": x}, {"x": x.T.copy().T}):
        (output,) = runner.run(inputs).values()
        assert output.dtype == np.float32
        np.testing.assert_array_equal(output, x + 1)
    assert [name for name, _ in runner.values({"x": x})] == ["y"]


def test_every_execution_is_timed(runner: EngineRunner) -> None:
    found = runner.latencies({"x": np.zeros((1, 3), np.float32)}, 5)
    assert len(found) == 5
    assert min(found) >= 0


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": np.zeros((1, 3))}, "takes x, not image"),
        ({"x": np.zeros((LARGEST + 1, 3))}, r"takes x \(-1, 3\), −1 within its profile; not \(5, 3\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict[str, np.ndarray], message: str, runner: EngineRunner) -> None:
    with pytest.raises(InputError, match=message):
        runner.run(inputs)


def test_a_failure_on_the_gpu_is_an_error(runner: EngineRunner) -> None:
    runner._context.fails = True
    with pytest.raises(TargetError, match="the GPU failed: out of memory"):
        runner.run({"x": np.zeros((1, 3), np.float32)})


@pytest.mark.usefixtures("runner")
def test_what_is_not_an_engine_is_refused_with_tensorrt_s_reason(tmp_path: Path) -> None:
    (tmp_path / "other.engine").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"TensorRT 10\.3\.0 cannot load other\.engine on this GPU: magic tag"):
        EngineRunner(tmp_path / "other.engine")


@pytest.mark.usefixtures("runner")
def test_without_a_gpu_nothing_is_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bindings, "missing_gpu", lambda: "no NVIDIA driver")
    with pytest.raises(TargetError, match=r"small\.engine cannot be executed here: no NVIDIA driver"):
        EngineRunner(tmp_path / "small.engine")


def test_a_missing_file_is_refused_before_anything_is_imported(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        EngineRunner(tmp_path / "none.engine")


def test_memory_is_of_cuda_bindings_where_torch_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="cuda-bindings"):
        memory.memory()


class FakeRuntime:
    """The part of `cuda.bindings.runtime` that is used, on memory of this side."""

    cudaError_t = SimpleNamespace(cudaSuccess=0)
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __init__(self) -> None:
        self.kept: dict[int, Any] = {}
        self.kinds: list[int] = []

    def cudaStreamCreate(self) -> tuple[int, int]:
        return 0, STREAM

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:
        return (0,)

    def cudaMalloc(self, nbytes: int) -> tuple[int, int | None]:
        if nbytes > 1 << 20:
            return 2, None
        content = ctypes.create_string_buffer(nbytes)
        address = ctypes.addressof(content)
        self.kept[address] = content
        return 0, address

    def cudaFree(self, address: int) -> tuple[int]:
        del self.kept[address]
        return (0,)

    def cudaMemcpyAsync(self, to: int, source: int, nbytes: int, kind: int, stream: int) -> tuple[int]:
        self.kinds.append(kind)
        ctypes.memmove(to, source, nbytes)
        return (0,)

    def cudaGetErrorString(self, status: int) -> tuple[int, bytes]:
        return 0, b"out of memory"


def test_cuda_s_memory_keeps_what_it_is_given_and_frees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr("importlib.import_module", lambda name: runtime)
    found = memory.CudaMemory()
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer = found.put(array)
    back = np.empty_like(array)
    found.get(buffer, back)
    np.testing.assert_array_equal(back, array)
    assert runtime.kinds == [1, 2]
    with pytest.raises(TargetError, match="CUDA failed in cudaMalloc: out of memory"):
        found.empty(1 << 21)
    assert len(runtime.kept) == 1
    del buffer
    assert not runtime.kept


def test_cuda_itself_says_what_is_missing() -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    if not bindings.missing_gpu():
        pytest.skip("there is a GPU")
    with pytest.raises(TargetError, match="CUDA failed in cudaStreamCreate: "):
        memory.CudaMemory()


@needs_rtx
def test_nvidia_s_own_runtime_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the API that both flavours share, as far as it goes without a GPU."""
    monkeypatch.setattr(bindings, "tensorrt", bindings.rtx)
    monkeypatch.setattr(bindings, "missing_gpu", lambda: None)
    (tmp_path / "small.engine").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"cannot load small\.engine on this GPU: \S+"):
        EngineRunner(tmp_path / "small.engine")
