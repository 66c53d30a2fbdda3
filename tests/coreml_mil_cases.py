"""One MIL program of many operations, executed from disk, with an oracle for each.

The oracle is coremltools' own numpy inference of the operation on constant inputs, or a function given with the case
where coremltools has none.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import coremltools as ct
import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types

from mobilemix.targets.coreml.executor import Executor
from mobilemix.targets.coreml.package import read_package

PLAIN = {"float32": types.fp32, "int32": types.int32}


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation, its run-time inputs (an array, or a list of arrays), and its constant parameters."""

    type: str
    inputs: dict[str, Any]
    parameters: dict[str, Any] = dataclasses.field(default_factory=dict)
    oracle: Callable[..., Any] | None = None

    @property
    def label(self) -> str:
        words = [f"{name}={value}" for name, value in self.parameters.items() if np.size(value) <= 6]
        return "-".join([self.type, *words]).replace(" ", "")


def _arrays(case: Case) -> dict[str, list[np.ndarray]]:
    return {name: value if isinstance(value, list) else [value] for name, value in case.inputs.items()}


def _call(case: Case, bound: dict[str, list[Any]], name: str) -> Any:
    inputs = {key: value if isinstance(case.inputs[key], list) else value[0] for key, value in bound.items()}
    return getattr(mb, case.type)(**inputs, **case.parameters, name=name)


def _outputs(variables: Any) -> list[Any]:
    return list(variables) if isinstance(variables, list | tuple) else [variables]


def inferred(case: Case, opset: ct.target) -> list[np.ndarray]:
    """What coremltools computes when every input is constant."""
    found: list[np.ndarray] = []

    @mb.program(input_specs=[mb.TensorSpec(shape=(1,))], opset_version=opset)
    def program(unused: Any) -> Any:
        bound = {name: [mb.const(val=each.copy()) for each in arrays] for name, arrays in _arrays(case).items()}
        for variable in _outputs(_call(case, bound, "folded")):
            assert variable.val is not None, f"coremltools cannot infer {case.type}; give the case an oracle"
            found.append(np.asarray(variable.val))
        return mb.identity(x=unused)

    return found


def _bound(given: Any, array: np.ndarray) -> Any:
    """The value that stands for `array`: Core ML has inputs of few types, and none without axes."""
    given = given if array.dtype.name in PLAIN else mb.cast(x=given, dtype=array.dtype.name)
    return given if array.ndim else mb.squeeze(x=given)


def executed(cases: Sequence[Case], opset: ct.target, folder: Path) -> list[list[np.ndarray]]:
    """The outputs of every case, from one saved package."""
    feeds = {
        f"c{i}_{name}_{j}": array
        for i, case in enumerate(cases)
        for name, arrays in _arrays(case).items()
        for j, array in enumerate(arrays)
    }

    program = Program()
    placeholders = {
        name: mb.placeholder(shape=array.shape or (1,), dtype=PLAIN.get(array.dtype.name, types.int32))
        for name, array in feeds.items()
    }
    with Function(placeholders, opset_version=opset) as function:
        given = function.inputs
        results = []
        for i, case in enumerate(cases):
            bound = {
                name: [_bound(given[f"c{i}_{name}_{j}"], each) for j, each in enumerate(arrays)]
                for name, arrays in _arrays(case).items()
            }
            for variable in _outputs(_call(case, bound, f"case{i}")):
                plain = variable.dtype in PLAIN.values()
                results.append(mb.identity(x=variable) if plain else mb.cast(x=variable, dtype="int32"))
        function.set_outputs(results)
        program.add_function("main", function)
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=opset,
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
    )
    path = folder / f"{opset.name}.mlpackage"
    model.save(str(path))
    package = read_package(path)
    produced = {}
    for operation in package.operations:
        if operation.name.startswith("case"):
            produced[operation.name] = [output.name for output in operation.outputs]
    inputs = {
        name: np.atleast_1d(array if array.dtype.name in PLAIN else array.astype(np.int32))
        for name, array in feeds.items()
    }
    values = dict(Executor(package, rounding="none").values(inputs))
    return [[values[name] for name in produced[f"case{i}"]] for i in range(len(cases))]
