"""`.tflite` files executed by LiteRT's interpreter on the CPU, with XNNPACK."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter, OpResolverType

from mobilemix.errors import InputError, first_line
from mobilemix.targets.base import Array, Inputs
from mobilemix.targets.litert import flatbuffer
from mobilemix.targets.litert.quiet import silent

SIGNATURE = "serving_default"
"""The name under which a model's inputs and outputs are found by theirs."""


class LiteRTRunner:
    """A LiteRT model (see `mobilemix.targets.base.Runner`)."""

    def __init__(self, content: bytes, name: str = "the file") -> None:
        """Prepare to execute the content of a file, which errors call `name`.

        Raises:
            InputError: corrupt, of operators that LiteRT has not, or without a signature `serving_default`.
        """
        self.content = content
        self.model = flatbuffer.parse(content, name)
        self._interpreter = self._open(OpResolverType.AUTO)
        if SIGNATURE not in self._interpreter.get_signature_list():
            raise InputError(f"the model has no signature {SIGNATURE}, by which its inputs are found")
        self._run = self._interpreter.get_signature_runner(SIGNATURE)
        details = self._run.get_input_details().items()
        self._shapes = {name: tuple(map(int, each["shape"])) for name, each in details}
        self._one_at_a_time = threading.Lock()

    @classmethod
    def from_file(cls, path: Path) -> "LiteRTRunner":
        """Read a file and prepare to execute it; raises as `__init__` does, and where there is no such file."""
        return cls(flatbuffer.read(path), str(path))

    def run(self, inputs: Inputs) -> dict[str, Array]:
        """Execute; outputs by name, float32.

        Raises:
            InputError: the inputs' names or shapes are not the model's.
        """
        stored = self._stored(inputs)
        if {name: value.shape for name, value in stored.items()} != self._shapes:
            wanted = ", ".join(f"{name} {shape}" for name, shape in self._shapes.items())
            given = ", ".join(f"{name} {value.shape}" for name, value in stored.items())
            raise InputError(f"the model takes {wanted}, not {given}")
        with self._one_at_a_time:
            outputs = self._run(**stored)
        return {name: np.asarray(value, np.float32) for name, value in outputs.items()}

    def values(self, inputs: Inputs) -> Iterator[tuple[str, Array]]:
        """Every floating-point or quantised value that an operator computes, by LiteRT's own kernels, in order."""
        interpreter = self._open(
            OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES, experimental_preserve_all_tensors=True
        )
        self._feed(interpreter, inputs)
        interpreter.invoke()
        graph = self.model.subgraphs[0]
        for each in graph.operators:
            for index in each.outputs:
                tensor = graph.tensors[index]
                if flatbuffer.dtype(tensor) in ("float32", "int8"):
                    yield flatbuffer.text(tensor.name), flatbuffer.dequantised(tensor, interpreter.get_tensor(index))

    def left_to_litert(self) -> list[str]:
        """Types of the operators that XNNPACK does not take, in order; LiteRT's own kernels run these."""
        operators = self._interpreter._get_ops_details()
        count = len(self.model.subgraphs[0].operators)
        makers = {int(output): index for index in range(count) for output in operators[index]["outputs"]}
        taken: set[int] = set()
        for delegate in operators[count:]:
            outside = set(map(int, delegate["inputs"]))
            queue = list(map(int, delegate["outputs"]))
            while queue:
                value = queue.pop()
                maker = makers.get(value)
                if value not in outside and maker is not None and maker not in taken:
                    taken.add(maker)
                    queue += map(int, operators[maker]["inputs"])
        return [operators[index]["op_name"] for index in range(count) if index not in taken]

    def _stored(self, inputs: Inputs) -> dict[str, Array]:
        """What the file takes: it holds 64-bit integers as 32-bit ones."""
        return {name: value.astype(np.int32) if value.dtype == np.int64 else value for name, value in inputs.items()}

    def _feed(self, interpreter: Any, inputs: Inputs) -> None:
        signatures = {flatbuffer.text(each.signatureKey): each for each in self.model.signatureDefs}
        indices = {flatbuffer.text(each.name): each.tensorIndex for each in signatures[SIGNATURE].inputs}
        for name, value in self._stored(inputs).items():
            interpreter.set_tensor(indices[name], value)

    def _open(self, resolver: OpResolverType, **options: Any) -> Any:
        try:
            with silent():
                interpreter = Interpreter(
                    model_content=self.content, experimental_op_resolver_type=resolver, num_threads=1, **options
                )
                interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise InputError(f"LiteRT cannot load the model: {first_line(error)}") from error
        return interpreter
