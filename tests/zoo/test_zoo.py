"""Every model of the zoo, whole, to every target: it arrives intact, in operators that each target has."""

from pathlib import Path

import pytest
from passes_checks import assert_real, operators
from zoo_models import ZOO, build, recipe

from mobilemix.api import Prepared, deploy, prepare
from mobilemix.passes import PASSES, lower

DEPLOYMENTS = (("onnx", "fp32"), ("coreml", "fp32"), ("coreml", "fp16"))
FOREIGN = {"DFT", "STFT", "ComplexMul", "Loop", "while_loop"}
"""Operators that runtimes refuse, run slowly or run wrongly in fp16."""

SCATTERED = {"mambapy"}
"""Its parallel scan writes every second element, every fourth and so on in place, which stays what it is."""

WRITTEN_FOR_FLOAT32 = {"fnet_matrices"}
"""Its code casts to complex64, so that it does not run in float64."""

SMALL = ("afno", "mambavision")


def prepared(name: str) -> Prepared:
    if package := ZOO[name].package:
        pytest.importorskip(package, reason=f"{name} needs {package}: pip install 'mobilemix[zoo]'")
    return prepare(recipe(name), module=build(name))


def check(model: Prepared, name: str, target: str, precision: str, folder: Path) -> None:
    result = deploy(model, recipe(name, target=target, precision=precision), folder / target / precision)
    assert result.parity.passed, result.parity
    assert result.parity.reference == ("float32" if name in WRITTEN_FOR_FLOAT32 else "float64")
    found = result.manifest.artifact["operators"]
    assert not {operator for operator in found if operator in FOREIGN or "complex" in operator or "fft" in operator}
    assert ("ScatterND" in found) == (target == "onnx" and name in SCATTERED)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_model_arrives_intact_at_every_target(name: str, tmp_path: Path) -> None:
    model = prepared(name)
    plain = lower(model.lowered.program, PASSES)
    assert_real(plain)
    assert not [operator for operator in operators(plain) if "scan" in operator]
    for target, precision in DEPLOYMENTS:
        check(model, name, target, precision, tmp_path)


@pytest.mark.parametrize("name", SMALL)
def test_some_models_arrive_intact_in_onnx(name: str, tmp_path: Path) -> None:
    check(prepared(name), name, "onnx", "fp32", tmp_path)
