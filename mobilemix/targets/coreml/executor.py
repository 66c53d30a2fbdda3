"""Execute a saved ML Program on any machine, as an independent reading of the file that Core ML will read.

Every operation's declared output types are checked against what was computed, so that a fault in the package or in a
rule stops at the operation that has it.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mobilemix.errors import InputError, UnsupportedOpError
from mobilemix.quantization.drift import Probe
from mobilemix.targets.coreml.mil_ops import RULES, Rule
from mobilemix.targets.coreml.package import Constant, Operation, Output, Package

Rounding = Literal["none", "fp16"]
FLOATS = ("fp16", "fp32", "fp64")
Value = Any
"""A torch tensor, a string, or the array that a classifier returns."""


class Executor:
    """Runs function "main" of a package with torch kernels on the CPU.

    Floats are computed in float32 whatever the program declares. `rounding` says what happens between operations:
    "none" leaves them so; "fp16" rounds each output that the program declares fp16 to the nearest float16 (infinite
    from 65520 on) while one operation computes in float32 inside, as units with wide accumulators do.

    Raises:
        UnsupportedOpError: the program has operations without a rule.
    """

    def __init__(self, package: Package, *, rounding: Rounding) -> None:
        """Look up every rule; weights are read at the first run. Several threads may run it at once."""
        self.package = package
        self.rounding = rounding
        missing = sorted({each.type for each in package.operations if each.type not in RULES and each.type != "const"})
        if missing:
            raise UnsupportedOpError(f"'{package.path}' has operations with no rule here: {', '.join(missing)}")
        self._dtypes = {name: declared.dtype for name, declared in package.inputs.items()}
        self._dtypes |= {output.name: output.dtype for each in package.operations for output in each.outputs}
        self._uses = Counter(name for each in package.operations for name in _references(each))
        self._uses.update(package.outputs)
        self._constants: dict[str, Value] = {}
        self._read: dict[int, Value] = {}
        self._reading = threading.Lock()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The program's outputs: float32, int32 or bool arrays.

        A classifier gives the label as an array of no axes and, under the probabilities' name, one value for each of
        `Package.labels` in their order.

        Raises:
            InputError: inputs that do not fit, or a program that contradicts itself.
        """
        wanted = set(self.package.outputs)
        results = {name: value for name, value in self._execute(inputs) if name in wanted}
        return {name: _array(results[name]) for name in self.package.outputs}

    def values(self, inputs: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Every operation's outputs, in execution order, by name.

        Constants are not among them, compressed weights once decompressed are, and so is not what `classify` returns.
        Raises as `run` does.
        """
        for name, value in self._execute(inputs):
            if isinstance(value, Tensor):
                yield name, _array(value)

    def probed(self, inputs: Mapping[str, np.ndarray], probe: Probe) -> list[Tensor]:
        """Run with gradients; the outputs that are numbers, every rounding of a value being one of the probe's points.

        A point has the name of the value. Raises as `run` does.
        """
        wanted = set(self.package.outputs)
        found = {name: value for name, value in self._execute(inputs, probe) if name in wanted}
        return [value for value in found.values() if isinstance(value, Tensor)]

    def _execute(self, inputs: Mapping[str, np.ndarray], probe: Probe | None = None) -> Iterator[tuple[str, Value]]:
        live: dict[str, Value] = self._inputs(inputs)
        exact: dict[str, tuple[str, Tensor]] = {}  # name and numbers of what was quantised, by the name of the integers
        uses = Counter(self._uses)
        for operation in self.package.operations:
            if operation.type == "const":
                self._constant(operation)
                continue
            constant = operation.type.startswith("constexpr_")
            scope = self._constants if constant else live
            if not constant or operation.outputs[0].name not in scope:
                made = self._operation(operation, live, graded=probe is not None)
                if probe is not None and operation.type in ("quantize", "dequantize"):
                    made = _probed(operation, live, made, exact, probe)
                scope.update(made)
            for output in operation.outputs:
                yield output.name, scope[output.name]
            for name in _references(operation):
                uses[name] -= 1
                if not uses[name]:
                    live.pop(name, None)

    def _inputs(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Value]:
        if set(inputs) != set(self.package.inputs):
            raise InputError(f"the program's inputs are {sorted(self.package.inputs)}, given were {sorted(inputs)}")
        values = {}
        for name, declared in self.package.inputs.items():
            given = torch.from_numpy(np.array(inputs[name]))
            values[name] = self._fitted(given, Output(name, declared.dtype, declared.shape), f"input '{name}'")
        return values

    def _constant(self, operation: Operation) -> None:
        name = operation.outputs[0].name
        with self._reading:
            if name in self._constants:
                return
            value = self._value(operation.attributes["val"])
            if isinstance(value, Tensor):
                value = self._fitted(value, operation.outputs[0], f"const '{name}'")
            self._constants[name] = value

    def _value(self, constant: Constant) -> Value:
        if constant.dtype == "string":
            return str(constant.array) if constant.shape == () else constant.array
        if id(constant) not in self._read:
            self._read[id(constant)] = _stored(torch.from_numpy(np.array(constant.array)), constant.dtype)
        return self._read[id(constant)]

    def _operation(self, operation: Operation, live: Mapping[str, Value], *, graded: bool) -> dict[str, Value]:
        rule = RULES[operation.type]
        what = f"{operation.type} '{operation.name}'"
        bound = operation.inputs | {name: (value,) for name, value in operation.attributes.items()}
        arguments: dict[str, Value] = {}
        dtypes: dict[str, str] = {}
        for parameter, argument in bound.items():
            values = [
                self._value(each) if isinstance(each, Constant) else live.get(each, self._constants.get(each))
                for each in argument
            ]
            if parameter not in rule.lists and len(values) != 1:
                raise InputError(f"{what}: {len(values)} arguments for '{parameter}'")
            arguments[parameter] = values if parameter in rule.lists else values[0]
            first = argument[0]
            dtypes[parameter] = first.dtype if isinstance(first, Constant) else self._dtypes[first]
        outputs = _computed(rule.compute, arguments, what, graded)
        if len(outputs) != len(operation.outputs):
            raise InputError(f"{what} declares {len(operation.outputs)} outputs, {len(outputs)} were computed")
        _check_dtypes(rule, operation, dtypes, arguments, what)
        return {
            declared.name: self._fitted(value, declared, what) if isinstance(value, Tensor) else value
            for declared, value in zip(operation.outputs, outputs, strict=True)
        }

    def _fitted(self, value: Tensor, declared: Output, what: str) -> Tensor:
        """`value` as the program declares it: checked, and rounded where that is asked for."""
        shape = tuple(value.shape)
        if len(shape) != len(declared.shape) or any(
            size not in (None, actual) for size, actual in zip(declared.shape, shape, strict=True)
        ):
            raise InputError(f"{what}: '{declared.name}' is declared {declared.shape}, its shape is {shape}")
        if value.is_floating_point() != (declared.dtype in FLOATS) or (value.dtype == torch.bool) != (
            declared.dtype == "bool"
        ):
            raise InputError(f"{what}: '{declared.name}' is declared {declared.dtype}, computed was {value.dtype}")
        value = _stored(value, declared.dtype)
        if self.rounding == "fp16" and declared.dtype == "fp16":
            value = value.half().float()
        return value


def _probed(
    operation: Operation,
    live: Mapping[str, Value],
    made: dict[str, Value],
    exact: dict[str, tuple[str, Tensor]],
    probe: Probe,
) -> dict[str, Value]:
    """Remember what is quantised, and make what is dequantised again a point of the probe."""
    (read,), (result,) = operation.inputs["input"], made
    if not isinstance(read, str):
        return made
    if operation.type == "quantize":
        exact[result] = (read, live[read])
        return made
    return {result: probe.round(*exact[read], made[result])}


def _references(operation: Operation) -> Iterator[str]:
    return (each for argument in operation.inputs.values() for each in argument if isinstance(each, str))


def _computed(compute: Callable[..., Any], arguments: Mapping[str, Value], what: str, graded: bool) -> Sequence[Value]:
    try:
        with torch.set_grad_enabled(graded):
            outputs = compute(**arguments)
    except (RuntimeError, ValueError, IndexError, TypeError, KeyError) as error:
        raise InputError(f"{what} cannot be executed: {' '.join(str(error).split())}") from error
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _check_dtypes(
    rule: Rule, operation: Operation, dtypes: Mapping[str, str], arguments: Mapping[str, Value], what: str
) -> None:
    expected = rule.result(dtypes, arguments)
    if expected is None:
        return
    each = expected if isinstance(expected, tuple) else (expected,) * len(operation.outputs)
    for declared, dtype in zip(operation.outputs, each, strict=True):
        if declared.dtype != dtype:
            raise InputError(f"{what}: '{declared.name}' is declared {declared.dtype}, its inputs make it {dtype}")


RANGES = {"int4": (-8, 7), "uint1": (0, 1), "uint2": (0, 3), "uint3": (0, 7), "uint4": (0, 15), "uint6": (0, 63)}
RANGES |= {
    name: (int(np.iinfo(name).min), int(np.iinfo(name).max))
    for name in ("int8", "int16", "int32", "uint8", "uint16", "uint32")
}


def _stored(value: Tensor, dtype: str) -> Tensor:
    """Floats as float32, integers as int64 within the declared type's range, bool as it is."""
    if dtype in FLOATS:
        return value.float()
    if dtype == "bool":
        return value.bool()
    value = value.long()
    low, high = RANGES.get(dtype, (None, None))
    if low is not None and high is not None and value.numel() and not low <= value.min() <= value.max() <= high:
        raise InputError(f"values from {int(value.min())} to {int(value.max())} do not fit {dtype}")
    return value


def _array(value: Value) -> np.ndarray:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    array: np.ndarray = value.numpy()
    return array.astype(np.int32) if array.dtype == np.int64 else np.array(array)
