"""How each peer converts a model and runs it. Executed in the peer's own environment, so packages are imported late.

`convert(name, folder, start)` writes what the peer runs into `folder`; `start` is the folder of the peer that it starts
from. `load(name, folder, threads)` returns a function from the image (1, 3, H, W) to the logits, both NumPy arrays.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the model, and its generated weights

GAIN = 0.7
"""Of the generated weights: keeps the activations of the deepest backbones in range."""

Run = Callable[[np.ndarray], np.ndarray]
Convert = Callable[[str, Path, Path | None], None]
Load = Callable[[str, Path, int], Run]


@dataclass(frozen=True)
class Peer:
    """One way to run a model.

    Attributes:
        title: as the tables call it.
        environment: key of `peers_environments.ENVIRONMENTS`.
        load: makes the function that is timed.
        convert: writes its file; None for what runs the module itself.
        starts_from: the peer whose file `convert` starts from.
        file: what `convert` writes, of which the size is stated.
        ours: whether mobilemix has a part in it.
        models: prefix of the names of the models that it is for.
    """

    title: str
    environment: str
    load: Load
    convert: Convert | None = None
    starts_from: str | None = None
    file: str = ""
    ours: bool = False
    models: str = ""


def build(name: str) -> Any:
    """The model in eval mode with generated weights: fresh ones have layer scales near zero, which hide errors."""
    import models_fidelity

    from mobilemix.models.registry import MODELS
    from mobilemix.models.registry import build as untrained

    model = untrained(MODELS[name]).requires_grad_(False)
    model.load_state_dict(models_fidelity.weights({key: one.shape for key, one in model.state_dict().items()}, GAIN))
    return model


def image(name: str) -> np.ndarray:
    """Standard normal values, the same at every call."""
    from mobilemix.models.registry import MODELS

    size = MODELS[name].input_size
    return np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)


def sample(name: str) -> tuple[Any]:
    """The image as arguments of the module."""
    import torch

    return (torch.from_numpy(image(name)),)


def load_eager(name: str, _folder: Path, threads: int) -> Run:
    """The module itself."""
    import torch

    torch.set_num_threads(threads)
    return module_run(build(name))


def module_run(module: Any) -> Run:
    """A module as a function of arrays."""
    import torch

    def run(x: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.from_numpy(x)).numpy()  # type: ignore[no-any-return]

    return run


def compile_ahead(name: str, folder: Path, _start: Path | None) -> None:
    """What torch.compile generates, kept in a file, with weights frozen into it: inductor's fastest way on CPUs.

    The number of threads is asked for when it runs, so that one file serves any.
    """
    os.environ["TORCHINDUCTOR_FREEZING"] = "1"
    os.environ["TORCHINDUCTOR_CPP_DYNAMIC_THREADS"] = "1"
    import torch

    with torch.no_grad():
        program = torch.export.export(build(name), sample(name))
        torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "model.pt2"))


def load_compiled(_name: str, folder: Path, threads: int) -> Run:
    """Inductor's file."""
    import torch

    torch.set_num_threads(threads)
    return module_run(torch._inductor.aoti_load_package(str(folder / "model.pt2")))


def export_stock(name: str, folder: Path, _start: Path | None) -> None:
    """PyTorch's exporter with its optimiser, as it comes."""
    export_module(build(name), name, folder)


def export_module(module: Any, name: str, folder: Path) -> None:
    """`torch.onnx.export` of a module."""
    import torch

    torch.onnx.export(module, sample(name), folder / "model.onnx", dynamo=True, external_data=False, verbose=False)


def export_matmuls(name: str, folder: Path, _start: Path | None) -> None:
    """What somebody would write by hand: each transform as two real matrix products, then export and onnxsim."""
    import peers_matmuls

    export_module(peers_matmuls.without_ffts(build(name), sample(name)), name, folder)
    simplify(name, folder, folder)


def simplify(_name: str, folder: Path, start: Path | None) -> None:
    """onnxsim."""
    import onnx
    import onnxsim

    model, passed = onnxsim.simplify(onnx.load(start / "model.onnx"))  # type: ignore[operator]
    if not passed:
        raise RuntimeError("onnxsim's own check failed")
    onnx.save(model, folder / "model.onnx")


def slim(_name: str, folder: Path, start: Path | None) -> None:
    """onnxslim."""
    import onnxslim

    onnxslim.slim(str(start / "model.onnx"), str(folder / "model.onnx"))  # type: ignore[operator]


def load_onnxruntime(_name: str, folder: Path, threads: int) -> Run:
    """An ONNX file in ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def lowered(name: str) -> Any:
    """The captured model after mobilemix's passes."""
    import torch

    from mobilemix.passes import lower

    with torch.no_grad():
        return lower(torch.export.export(build(name), sample(name)))


def convert_openvino(name: str, folder: Path, _start: Path | None) -> None:
    """OpenVINO's converter, given the module."""
    import openvino

    model = openvino.convert_model(build(name), example_input=sample(name), input=[image(name).shape])
    openvino.save_model(model, folder / "model.xml", compress_to_fp16=False)


def convert_openvino_lowered(name: str, folder: Path, _start: Path | None) -> None:
    """OpenVINO's converter, given the lowered program."""
    import openvino

    openvino.save_model(openvino.convert_model(lowered(name)), folder / "model.xml", compress_to_fp16=False)


def load_openvino(_name: str, folder: Path, threads: int) -> Run:
    """OpenVINO on the CPU. Without the hint, a CPU that has bfloat16 uses it."""
    import openvino

    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
    }
    compiled = openvino.compile_model(folder / "model.xml", "CPU", options)
    return lambda x: compiled([x])[0]


def convert_ncnn(name: str, folder: Path, _start: Path | None) -> None:
    """pnnx of a trace; weights stay float32."""
    import pnnx

    pnnx.export(build(name), str(folder / "model.pt"), sample(name), fp16=False)
    refuse_unknown_layers(folder)


def convert_ncnn_lowered(name: str, folder: Path, _start: Path | None) -> None:
    """pnnx of a trace of the lowered program."""
    import pnnx

    # Its export() wants to put the module into eval mode, which a captured program is in and refuses to be told.
    module = lowered(name).module()
    module.eval = lambda: module
    pnnx.export(module, str(folder / "model.pt"), sample(name), fp16=False)
    refuse_unknown_layers(folder)


def refuse_unknown_layers(folder: Path) -> None:
    """pnnx writes what it cannot translate under its PyTorch name, and ncnn then only prints that it does not load."""
    layers = [line.split()[0] for line in (folder / "model.ncnn.param").read_text().splitlines()[2:]]
    unknown = dict.fromkeys(layer for layer in layers if "." in layer or "::" in layer)
    if unknown:
        raise RuntimeError(f"pnnx left {', '.join(unknown)}, which ncnn does not have")


def load_ncnn(_name: str, folder: Path, threads: int) -> Run:
    """ncnn on the CPU in float32."""
    import ncnn

    net = ncnn.Net()
    net.opt.use_vulkan_compute = False
    net.opt.num_threads = threads
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(folder / "model.ncnn.param")) or net.load_model(str(folder / "model.ncnn.bin")):
        raise RuntimeError("ncnn cannot load what pnnx wrote")

    def run(x: np.ndarray) -> np.ndarray:
        with net.create_extractor() as extractor:
            extractor.input("in0", ncnn.Mat(x[0]).clone())
            status, out = extractor.extract("out0")
            if status:
                raise RuntimeError(f"ncnn cannot run what pnnx wrote: status {status}")
            return np.array(out)[None]

    return run


def convert_litert(name: str, folder: Path, _start: Path | None) -> None:
    """litert-torch, given the module."""
    import litert_torch

    litert_torch.convert(build(name), sample(name)).export(str(folder / "model.tflite"))


def load_litert(_name: str, folder: Path, threads: int) -> Run:
    """LiteRT's interpreter with XNNPACK."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(folder / "model.tflite"), num_threads=threads)
    interpreter.allocate_tensors()
    (x_index,) = (one["index"] for one in interpreter.get_input_details())
    y_index = interpreter.get_output_details()[0]["index"]

    def run(x: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(x_index, x)
        interpreter.invoke()
        return interpreter.get_tensor(y_index)  # type: ignore[no-any-return]

    return run


def convert_executorch(name: str, folder: Path, _start: Path | None) -> None:
    """ExecuTorch with its XNNPACK partitioner, given the exported module."""
    import torch

    to_executorch(torch.export.export(build(name), sample(name)), folder)


def convert_executorch_lowered(name: str, folder: Path, _start: Path | None) -> None:
    """The same, given the lowered program."""
    to_executorch(lowered(name), folder)


def to_executorch(program: Any, folder: Path) -> None:
    """Partition, lower and write."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    (folder / "model.pte").write_bytes(edge.to_executorch().buffer)


def load_executorch(_name: str, folder: Path, threads: int) -> Run:
    """ExecuTorch's runtime."""
    import torch
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(threads)
    buffer = (folder / "model.pte").read_bytes()  # the program reads from it without keeping it alive
    program = Runtime.get().load_program(buffer)
    method = program.load_method("forward")

    def run(x: np.ndarray, _alive: tuple[Any, ...] = (buffer, program)) -> np.ndarray:
        return method.execute([torch.from_numpy(x)])[0].numpy()  # type: ignore[no-any-return]

    return run


def export_mobilemix(name: str, folder: Path, target: str) -> None:
    """What `mobilemix export` writes, verified."""
    import mobilemix

    done = mobilemix.export(build(name), target=target, input_shapes=(image(name).shape,), output=folder)
    if not done.parity.passed:
        raise RuntimeError(f"verification failed: {done.parity}")
    done.path.rename(folder / f"model{done.path.suffix}")


def convert_mobilemix_onnx(name: str, folder: Path, _start: Path | None) -> None:
    """mobilemix to ONNX."""
    export_mobilemix(name, folder, "onnx")


def convert_mobilemix_litert(name: str, folder: Path, _start: Path | None) -> None:
    """mobilemix to LiteRT."""
    export_mobilemix(name, folder, "litert")


def load_sgemm(_name: str, _folder: Path, threads: int) -> Run:
    """A product of two square matrices in float32, by NumPy or by torch, whichever is faster here."""
    import time

    import torch

    torch.set_num_threads(threads)
    a = np.random.default_rng(0).standard_normal((SGEMM_SIZE, SGEMM_SIZE), dtype=np.float32)
    out = np.empty_like(a)
    runs = (lambda _: np.matmul(a, a, out=out), module_run(lambda _: torch.from_numpy(a) @ torch.from_numpy(a)))

    def seconds(run: Run) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run(a)
            times.append(time.perf_counter() - start)
        return min(times)

    return min(runs, key=seconds)


SGEMM_SIZE = 1024
SGEMM = "sgemm"

PEERS: dict[str, Peer] = {
    "mobilemix-onnx": Peer(
        "mobilemix → ONNX Runtime",
        "mobilemix",
        load_onnxruntime,
        convert_mobilemix_onnx,
        file="model.onnx",
        ours=True,
    ),
    "mobilemix-litert": Peer(
        "mobilemix → LiteRT",
        "mobilemix-litert",
        load_litert,
        convert_mobilemix_litert,
        file="model.tflite",
        ours=True,
    ),
    "eager": Peer("PyTorch eager", "pytorch", load_eager),
    "compile": Peer("torch.compile, ahead of time", "pytorch", load_compiled, compile_ahead, file="model.pt2"),
    "onnxruntime": Peer(
        "torch.onnx.export → ONNX Runtime", "onnxruntime", load_onnxruntime, export_stock, file="model.onnx"
    ),
    "onnxsim": Peer(
        "torch.onnx.export, onnxsim → ONNX Runtime",
        "onnxsim",
        load_onnxruntime,
        simplify,
        starts_from="onnxruntime",
        file="model.onnx",
    ),
    "onnxslim": Peer(
        "torch.onnx.export, onnxslim → ONNX Runtime",
        "onnxslim",
        load_onnxruntime,
        slim,
        starts_from="onnxruntime",
        file="model.onnx",
    ),
    "matmuls": Peer(
        "matmuls by hand, onnxsim → ONNX Runtime",
        "onnxsim",
        load_onnxruntime,
        export_matmuls,
        file="model.onnx",
        models="affnet",
    ),
    "openvino": Peer("OpenVINO", "openvino", load_openvino, convert_openvino, file="model.*"),
    "ncnn": Peer("ncnn through pnnx", "ncnn", load_ncnn, convert_ncnn, file="model.ncnn.*"),
    "litert": Peer("LiteRT through litert-torch", "litert", load_litert, convert_litert, file="model.tflite"),
    "executorch": Peer("ExecuTorch, XNNPACK", "executorch", load_executorch, convert_executorch, file="model.pte"),
    "mobilemix-openvino": Peer(
        "mobilemix's passes → OpenVINO",
        "openvino",
        load_openvino,
        convert_openvino_lowered,
        file="model.*",
        ours=True,
    ),
    "mobilemix-ncnn": Peer(
        "mobilemix's passes → ncnn", "ncnn", load_ncnn, convert_ncnn_lowered, file="model.ncnn.*", ours=True
    ),
    "mobilemix-executorch": Peer(
        "mobilemix's passes → ExecuTorch",
        "executorch",
        load_executorch,
        convert_executorch_lowered,
        file="model.pte",
        ours=True,
    ),
}

ROUTES = {**PEERS, SGEMM: Peer("sgemm", "pytorch", load_sgemm)}
