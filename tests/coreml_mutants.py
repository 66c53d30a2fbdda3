"""Faults to plant in a saved package, on disk, as a wrong compiler or a bad disk would."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from coremltools.proto import Model_pb2

from mobilemix.targets.coreml.package import read_package

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"

Block = Any
Mutant = Callable[[Path], None]


def edited(change: Callable[[Block], None]) -> Mutant:
    """A mutant that changes the program's protobuf."""

    @functools.wraps(change)
    def plant(package: Path) -> None:
        file = package / MODEL
        model = Model_pb2.Model.FromString(file.read_bytes())
        function = model.mlProgram.functions["main"]
        change(function.block_specializations[function.opset])
        data = model.SerializeToString()
        assert data != file.read_bytes(), "nothing was planted"
        file.write_bytes(data)

    return plant


@edited
def tanh_gelu(block: Block) -> None:
    parameter(block, operation(block, "gelu"), "mode").strings.values[0] = "TANH_APPROXIMATION"


@edited
def swapped_split(block: Block) -> None:
    outputs = operation(block, "split").outputs
    outputs[0].name, outputs[1].name = outputs[1].name, outputs[0].name


@edited
def swapped_operands(block: Block) -> None:
    inputs = operation(block, "sub").inputs
    x, y = inputs["x"].arguments[0].name, inputs["y"].arguments[0].name
    inputs["x"].arguments[0].name, inputs["y"].arguments[0].name = y, x


@edited
def wrong_operator(block: Block) -> None:
    operation(block, "sub").type = "add"


@edited
def wrong_epsilon(block: Block) -> None:
    tensor = parameter(block, operation(block, "layer_norm"), "epsilon")
    if tensor.WhichOneof("value") == "bytes":
        tensor.bytes.values = np.float16(2e-3).tobytes()
    else:
        tensor.floats.values[0] = 2e-3


@edited
def wrong_axis(block: Block) -> None:
    parameter(block, operation(block, "softmax"), "axis").ints.values[0] = 1


@edited
def shifted_padding(block: Block) -> None:
    parameter(block, operation(block, "conv"), "pad").ints.values[:] = [0, 2, 1, 1]


@edited
def flipped_bit_of_a_small_constant(block: Block) -> None:
    """In the protobuf rather than in the weight file: the bias of the last layer has fewer than ten elements."""
    tensor = parameter(block, operation(block, "linear", last=True), "bias")
    if tensor.WhichOneof("value") == "bytes":
        data = bytearray(tensor.bytes.values)
        data[0] ^= 1
        tensor.bytes.values = bytes(data)
    else:
        tensor.floats.values[0] = np.nextafter(np.float32(tensor.floats.values[0]), np.float32(9))


def flipped_weight_bit(package: Path) -> None:
    """The lowest bit of the significand of one weight of the convolution."""
    with stored(package, "stem_0_weight") as weights:
        weights.reshape(-1)[17:18].view(f"u{weights.itemsize}")[:] ^= 1


def conjugate_dft(package: Path) -> None:
    """The imaginary half of the matrix of the first transform, (frequencies, pixels), with the other sign."""
    with stored(package, "transpose_0") as matrix:
        matrix[len(matrix) // 2 :] *= -1


class stored:
    """The values of a stored constant, by a part of its name, to be changed in place."""

    def __init__(self, package: Path, name: str) -> None:
        constants = {
            each.outputs[0].name: each.attributes["val"]
            for each in read_package(package).operations
            if each.type == "const"
        }
        # Of several, the first by its name in the program, so that both precisions are changed in the same one.
        key = min((key for key in constants if name in key), key=lambda key: key.removesuffix("_to_fp16"))
        constant = constants[key]
        assert constant.file_offset is not None
        self.file, self.offset = package / WEIGHTS, constant.file_offset
        self.before = constant.array
        self.values = constant.array.copy()

    def __enter__(self) -> np.ndarray:
        return self.values

    def __exit__(self, *_exception: object) -> None:
        assert self.values.tobytes() != self.before.tobytes(), "nothing was planted"
        data = bytearray(self.file.read_bytes())
        data[self.offset : self.offset + self.values.nbytes] = self.values.tobytes()
        self.file.write_bytes(bytes(data))


def operation(block: Block, kind: str, last: bool = False) -> Any:
    """The first (or last) operation of a type."""
    found = [each for each in block.operations if each.type == kind]
    return found[-1 if last else 0]


def parameter(block: Block, operation: Any, name: str) -> Any:
    """The immediate tensor of the constant that is bound to a parameter."""
    bound = operation.inputs[name].arguments[0].name
    constant = next(each for each in block.operations if each.outputs and each.outputs[0].name == bound)
    return constant.attributes["val"].immediateValue.tensor


VISIBLE: tuple[Mutant, ...] = (
    tanh_gelu,
    swapped_split,
    swapped_operands,
    wrong_operator,
    wrong_epsilon,
    wrong_axis,
    shifted_padding,
    conjugate_dft,
)
"""Faults that change the function enough for the float32 build to show them."""

BITS: tuple[Mutant, ...] = (flipped_weight_bit, flipped_bit_of_a_small_constant)
"""Faults below the resolution of any comparison of outputs."""
