"""Is an fp16 package the fp32 one with its numbers rounded, and nothing else?

An end-to-end tolerance for float16 hides real faults: the tanh form of GELU, a swapped split or a flipped weight bit
stay below the rounding of every value. So the two programs are compared as graphs, from the outputs back to the inputs
(the order of independent operations does not matter): the same operators, the same wiring, the same parameters, and
every constant exactly the rounded one, bit for bit. All that may differ is casts between float16 and float32, casts
between widths of integers, and operations that change nothing: times ones, plus zeros.
"""

import dataclasses
from collections import deque

import numpy as np

from mobilemix.targets.coreml.package import Constant, Operation, Package

_KINDS = dict.fromkeys(("fp16", "fp32"), "float") | dict.fromkeys(("int16", "uint16", "int32"), "integer")

_NEUTRAL = {"mul": 1, "add": 0}

_SMALLEST_FP16 = np.float16(2**-24)
_GUARDED_SIZE = 400
"""coremltools keeps constants below this many elements from vanishing: see `rounded`."""


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """What the comparison found.

    Attributes:
        operations: how many operations were matched, casts and constants not counted.
        constants: how many constants were compared.
        in_float16: names, in the float32 build, of the values and constants that are float16 in the fp16 package.
        left_in_float32: names of the operations that compute in float32 in the fp16 package, too.
        differences: one line for each, in the order of the walk; empty if the programs are equal.
    """

    operations: int
    constants: int
    in_float16: frozenset[str]
    left_in_float32: tuple[str, ...]
    differences: tuple[str, ...]


def compare(fp32: Package, fp16: Package) -> Equivalence:
    """Match `fp16` with `fp32`, the build of the same program in full precision."""
    return _Walk(fp32, fp16).result()


def rounded(values: np.ndarray) -> np.ndarray:
    """What coremltools stores for float32 constants: IEEE round to nearest even, with one exception.

    In a tensor of fewer than 400 elements a non-zero value that would become 0 or ±2⁻²⁴ becomes ±2⁻²⁴, so that an
    epsilon does not vanish. Values beyond ±65504 are not rounded at all: coremltools leaves the operation in float32.
    """
    with np.errstate(over="ignore"):
        result = values.astype(np.float16)
    if values.size < _GUARDED_SIZE:
        vanishing = (values != 0) & (np.abs(result) <= _SMALLEST_FP16)
        result = np.where(vanishing, np.copysign(_SMALLEST_FP16, values).astype(np.float16), result)
    return result


class _Graph:
    """A package's values by name; what changes nothing is seen through."""

    def __init__(self, package: Package) -> None:
        self.inputs = package.inputs
        self.producers = {
            output.name: (operation, index)
            for operation in package.operations
            for index, output in enumerate(operation.outputs)
        }

    def resolve(self, bound: str | Constant) -> str | Constant:
        """The value behind an argument: a constant, an input's name, or an output's name of an operation proper."""
        while isinstance(bound, str) and bound in self.producers:
            operation, _ = self.producers[bound]
            if operation.type == "const":
                return operation.attributes["val"]
            passed = self.passed_on(operation)
            if passed is None:
                return bound
            bound = passed
        return bound

    def passed_on(self, operation: Operation) -> str | Constant | None:
        """The argument that an operation hands on as it is, but for its width; None if it computes something."""
        if operation.type == "cast":
            kind = _KINDS.get(self.dtype(operation.inputs["x"][0]))
            same = kind is not None and kind == _KINDS.get(operation.outputs[0].dtype)
            return operation.inputs["x"][0] if same else None
        # coremltools drops them where their value is no output of the program: in fp16 a cast stands behind it.
        neutral = _NEUTRAL.get(operation.type)
        for name, other in (("x", "y"), ("y", "x")) if neutral is not None else ():
            bound, constant = operation.inputs[name][0], self._constant(operation.inputs[other][0])
            is_neutral = constant is not None and bool(np.all(constant.array == neutral))
            if is_neutral and self.shape(bound) == operation.outputs[0].shape:
                return bound
        return None

    def _constant(self, bound: str | Constant) -> Constant | None:
        if isinstance(bound, str) and bound in self.producers:
            operation, _ = self.producers[bound]
            return operation.attributes["val"] if operation.type == "const" else None
        return bound if isinstance(bound, Constant) else None

    def shape(self, bound: str | Constant) -> tuple[int | None, ...]:
        if isinstance(bound, Constant):
            return bound.shape
        if bound in self.inputs:
            return self.inputs[bound].shape
        operation, index = self.producers[bound]
        return operation.outputs[index].shape

    def dtype(self, bound: str | Constant) -> str:
        if isinstance(bound, Constant):
            return bound.dtype
        if bound in self.inputs:
            return self.inputs[bound].dtype
        operation, index = self.producers[bound]
        return operation.outputs[index].dtype


class _Walk:
    """Breadth first from the outputs; each float32 value is paired with one value of the fp16 program, once."""

    def __init__(self, fp32: Package, fp16: Package) -> None:
        self.packages = fp32, fp16
        self.fp32, self.fp16 = _Graph(fp32), _Graph(fp16)
        self.differences: list[str] = []
        self.constants = 0
        self.values: dict[str, str] = {}
        self.operations: dict[int, Operation] = {}
        self.in_float16: set[str] = set()
        self.left_in_float32: list[str] = []
        self.pending: deque[tuple[str, str]] = deque()

    def result(self) -> Equivalence:
        fp32, fp16 = self.packages
        for what in ("opset", "inputs", "outputs"):
            one, other = getattr(fp32, what), getattr(fp16, what)
            if one != other:
                self.differences.append(f"{what} are {other}, not {one}")
        for one, other in zip(fp32.outputs, fp16.outputs, strict=False):
            self._bound(one, other, f"output '{one}'")
        while self.pending:
            self._pair(*self.pending.popleft())
        self._unmatched()
        return Equivalence(
            operations=len(self.operations),
            constants=self.constants,
            in_float16=frozenset(self.in_float16),
            left_in_float32=tuple(self.left_in_float32),
            differences=tuple(self.differences),
        )

    def _bound(self, one: str | Constant, other: str | Constant, what: str) -> None:
        """Compare two arguments, or queue the values that they name."""
        name = one
        one, other = self.fp32.resolve(one), self.fp16.resolve(other)
        if isinstance(name, str) and self.fp16.dtype(other) == "fp16":
            self.in_float16.add(name)
        if isinstance(one, Constant) and isinstance(other, Constant):
            self._constant(one, other, what)
        elif isinstance(one, str) and isinstance(other, str):
            known = self.values.setdefault(one, other)
            if known != other:
                self.differences.append(f"{what} reads '{other}' where '{known}' is expected")
            elif one not in self.fp32.inputs or other not in self.fp16.inputs:
                self.pending.append((one, other))
            elif one != other:
                self.differences.append(f"{what} reads input '{other}', not '{one}'")
        else:
            self.differences.append(f"{what} is a constant in one program and computed in the other")

    def _pair(self, one: str, other: str) -> None:
        """Match the operations that compute two values."""
        if one not in self.fp32.producers or other not in self.fp16.producers:
            self.differences.append(f"'{other}' is an input in one program and computed in the other")
            return
        expected, index = self.fp32.producers[one]
        found, position = self.fp16.producers[other]
        if index != position:
            self.differences.append(f"output {position} of {_called(found)} is read where output {index} is expected")
        if id(expected) in self.operations:
            if self.operations[id(expected)] is not found:
                self.differences.append(f"{_called(found)} stands where another copy of it is expected")
            return
        self.operations[id(expected)] = found
        if expected.type != found.type:
            self.differences.append(f"{_called(found)} stands where {_called(expected)} is expected")
            return
        if found.outputs[0].dtype == "fp32":
            self.left_in_float32.append(found.name)
        shapes = [output.shape for output in found.outputs]
        if shapes != [output.shape for output in expected.outputs]:
            self.differences.append(f"{_called(found)} has outputs of shape {shapes}")
        if _form(expected) != _form(found):
            self.differences.append(f"{_called(found)} has the parameters {_form(found)}, not {_form(expected)}")
            return
        for name, arguments in expected.inputs.items():
            others = found.inputs[name]
            if len(arguments) != len(others):
                self.differences.append(f"{_called(found)} has {len(others)} values for {name}, not {len(arguments)}")
            for argument, counterpart in zip(arguments, others, strict=False):
                self._bound(argument, counterpart, f"{_called(found)}, {name},")
        for name, attribute in expected.attributes.items():
            self._constant(attribute, found.attributes[name], f"{_called(found)}, {name},")

    def _constant(self, one: Constant, other: Constant, what: str) -> None:
        self.constants += 1
        if one.shape != other.shape:
            self.differences.append(f"{what} has shape {other.shape}, not {one.shape}")
        elif (reason := _difference(one, other)) is not None:
            self.differences.append(f"{what} {reason}")

    def _unmatched(self) -> None:
        """Operations that no output depends on in one program only."""
        reached = ({*self.operations}, {id(found) for found in self.operations.values()})
        dead = [
            [
                operation
                for operation in package.operations
                if operation.type != "const" and id(operation) not in matched and graph.passed_on(operation) is None
            ]
            for package, graph, matched in zip(self.packages, (self.fp32, self.fp16), reached, strict=True)
        ]
        if not self.differences and len(dead[0]) != len(dead[1]):
            self.differences.append(f"operations without use: {[_called(each) for each in dead[0] + dead[1]]}")


def _form(operation: Operation) -> tuple[list[str], list[str], int]:
    """Names of its parameters and attributes, and how many blocks it has."""
    return sorted(operation.inputs), sorted(operation.attributes), operation.blocks


def _called(operation: Operation) -> str:
    return f"{operation.type} '{operation.name}'"


def _difference(fp32: Constant, fp16: Constant) -> str | None:
    """Why `fp16` is not `fp32`, rounded if it is narrower; None if it is."""
    expected, found = fp32.array, fp16.array
    if (fp32.dtype, fp16.dtype) == ("fp32", "fp16"):
        expected = rounded(expected)
    elif fp32.dtype == fp16.dtype == "string" and expected.size == 1:
        # The target of a cast between kinds.
        kinds = _KINDS.get(expected.item()), _KINDS.get(found.item())
        if kinds[0] is not None and kinds[0] == kinds[1]:
            return None
    elif fp32.dtype != fp16.dtype and not _KINDS.get(fp32.dtype) == _KINDS.get(fp16.dtype) == "integer":
        return f"is {fp16.dtype}, not {fp32.dtype}"
    if found.dtype.kind == "f":
        wrong = expected.view(f"u{expected.itemsize}") != found.view(f"u{found.itemsize}")
    else:
        wrong = expected != found
    count = int(np.count_nonzero(wrong))
    if not count:
        return None
    where = tuple(int(index) for index in np.argwhere(wrong)[0])
    return f"differs in {count} of {found.size} values, first {found[where]} for {expected[where]} at {list(where)}"
