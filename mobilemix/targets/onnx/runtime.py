"""ONNX files executed by ONNX Runtime on the CPU."""

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as MissingKernel

from mobilemix.errors import InputError, TargetError, first_line
from mobilemix.targets.base import Array, Inputs
from mobilemix.targets.onnx import emulation

_FATAL_ONLY = 4
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_PRODUCTS = "session.qdq_matmulnbits_accuracy_level"
_IN_FLOAT32 = "1"
"""Of products with dequantised weights, before which ONNX Runtime rounds activations to 8 bits by itself."""
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


def read_model(path: Path) -> onnx.ModelProto:
    """Read the graph of an ONNX file; weights in a file beside it stay there.

    Raises:
        InputError: missing, corrupt, or not ONNX.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise InputError(f"cannot read {path} as an ONNX model: {error}") from error
    # Almost any bytes decode as some protobuf message; every ONNX model has these.
    if not model.ir_version or not model.graph.output:
        raise InputError(f"{path} is not an ONNX model, or it is cut short")
    return model


def histogram(path: Path) -> dict[str, int]:
    """Occurrences by operator type in a file's graph, in alphabetical order; raises as `read_model`."""
    return dict(sorted(Counter(node.op_type for node in read_model(path).graph.node).items()))


class OnnxRunner:
    """An ONNX model in ONNX Runtime; `optimised` False runs its nodes exactly as they are written.

    bfloat16 is emulated, see `mobilemix.targets.onnx.emulation`.
    """

    def __init__(self, path: Path, optimised: bool = True) -> None:
        """Open the file.

        Raises:
            InputError: missing, corrupt, or not ONNX.
            TargetError: ONNX Runtime has no kernel for one of its nodes.
        """
        self._path = path
        files = [file for file in (path, path.with_suffix(".data")) if file.exists()]
        self._session = _session(path, optimised, tuple((file, file.stat().st_mtime_ns) for file in files))

    def run(self, inputs: Inputs) -> dict[str, Array]:
        """Execute; outputs by name, float32.

        Raises:
            InputError: the inputs' names or shapes are not the model's.
        """
        return dict(_execute(self._session, inputs))

    def values(self, inputs: Inputs) -> Iterator[tuple[str, Array]]:
        """Every floating-point value that a node computes, in the file's order, before any optimisation."""
        _, values = trace(self._path, inputs)
        yield from values.items()


@functools.lru_cache(maxsize=1)  # the run that is compared, and the checks after it, are of one file
def _session(path: Path, optimised: bool, _modified: tuple[tuple[Path, int], ...]) -> ort.InferenceSession:
    """The file as `OnnxRunner` runs it, kept until it is another or modified; raises as that does."""
    model = read_model(path)  # says what is wrong with a file that is none
    if not emulation.is_needed(model):
        return _open(str(path), optimised)
    emulation.emulate(model, path.parent)
    return _open(model.SerializeToString(), optimised)


def trace(path: Path, inputs: Inputs) -> tuple[dict[str, Array], dict[str, Array]]:
    """Run the nodes of a file exactly as they are written: its outputs, and every floating-point value, in order.

    Raises as `OnnxRunner` and its `run` do.
    """
    model = read_model(path)
    outputs = [value.name for value in model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.value_info, *model.graph.output)}
    names = [name for node in model.graph.node for name in node.output if types.get(name) in _FLOATS]
    (found,) = _observe(path, model, [*names, *outputs], [inputs])
    return {name: found[name] for name in outputs}, {name: found[name] for name in names}


def observe(
    path: Path, names: Iterable[str], samples: Iterable[Inputs], optimised: bool = False
) -> Iterator[dict[str, Array]]:
    """These values of a file, inputs among them or not, for each sample; float32. Raises as `trace` does.

    `optimised` lets ONNX Runtime fuse the nodes between them, of 8-bit integers too.
    """
    return _observe(path, read_model(path), names, samples, optimised)


def _observe(
    path: Path, model: onnx.ModelProto, names: Iterable[str], samples: Iterable[Inputs], optimised: bool = False
) -> Iterator[dict[str, Array]]:
    """As `observe`, with the content of the file."""
    wanted = dict.fromkeys(names)
    given = wanted.keys() & {value.name for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    more = [onnx.helper.make_empty_tensor_value_info(name) for name in wanted if name not in given | outputs]
    if emulation.is_needed(model):
        emulation.emulate(model, path.parent)
        content = model.SerializeToString()
    else:
        content = path.read_bytes()
    # One message after another is one message, with the outputs of both: no weight has to be written anew for them.
    content += onnx.ModelProto(graph=onnx.GraphProto(output=more)).SerializeToString()
    session = _open(content, optimised, folder=path.parent)
    for sample in samples:
        found = {**dict(_execute(session, sample)), **{name: sample[name] for name in given}}
        yield {name: found[name] for name in wanted}


def _open(model: str | bytes, optimised: bool, folder: Path | None = None) -> ort.InferenceSession:
    """A session of a file, or one to observe: of its content with the folder that its weights are in.

    The latter rounds nothing that the file does not.
    """
    options = ort.SessionOptions()
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    options.log_severity_level = _FATAL_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores have other things to do
    if folder is not None:
        options.add_session_config_entry(_EXTERNAL_FOLDER, str(folder.resolve()))
        options.add_session_config_entry(_PRODUCTS, _IN_FLOAT32)
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except MissingKernel as error:
        raise TargetError(f"ONNX Runtime has no kernel for a node of the model: {first_line(error)}") from error
    except Exception as error:
        raise InputError(f"ONNX Runtime cannot load the model: {first_line(error)}") from error


def _execute(session: ort.InferenceSession, inputs: Inputs) -> Iterator[tuple[str, Array]]:
    names = [output.name for output in session.get_outputs()]
    try:
        values = session.run(names, dict(inputs))
    except (InvalidArgument, ValueError) as error:
        wanted = ", ".join(f"{value.name} {tuple(value.shape)}" for value in session.get_inputs())
        raise InputError(f"the model takes {wanted}: {first_line(error)}") from error
    for name, value in zip(names, values, strict=True):
        yield name, np.asarray(value, np.float32)
