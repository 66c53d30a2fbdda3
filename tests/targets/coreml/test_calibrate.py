import numpy as np
import pytest
from coreml_compressible import lowered, samples
from coreml_lowered import FP32

from mobilemix.quantization.moments import Moments
from mobilemix.quantization.observers import OBSERVERS
from mobilemix.targets.coreml.calibrate import AT_ONCE, moments_of, observed
from mobilemix.targets.coreml.convert import convert
from mobilemix.targets.coreml.layers import Layer, layers
from mobilemix.targets.coreml.package import Constant, read_package
from mobilemix.targets.coreml.target import PackageRunner

EXACT = 1e-6
"""Relative: sums in float64 of float32 values."""
Case = tuple[PackageRunner, list[Layer], dict[str, Constant]]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model, path = lowered(), tmp_path_factory.mktemp("calibrate") / "model.mlpackage"
    convert(model, FP32, path)
    package = read_package(path)
    constants = {each.outputs[0].name: each.attributes["val"] for each in package.operations if each.type == "const"}
    return PackageRunner(package), layers(package, model), constants


def test_ranges_are_those_of_all_samples(case: Case) -> None:
    runner, found, _ = case
    given = samples(AT_ONCE + 3)
    names = {str(layer.value) for layer in found if layer.value not in (None, "image")}
    ranges = observed(runner, names, given, "min-max")
    assert ranges.keys() == names
    for name in names:
        values = [dict(runner.values(sample))[name] for sample in given]
        assert ranges[name] == (
            min(0.0, *(float(each.min()) for each in values)),
            max(float(each.max()) for each in values),
        )


@pytest.mark.parametrize("observer", sorted(OBSERVERS))
def test_ranges_do_not_depend_on_which_thread_is_first(observer: str, case: Case) -> None:
    runner, found, _ = case
    names = {str(layer.value) for layer in found if layer.value not in (None, "image")}
    one, other = (observed(runner, names, samples(5), observer) for _ in range(2))
    assert one == other


def test_moments_tell_what_a_change_of_weights_does(case: Case) -> None:
    """Of layers with few positions, all of which count."""
    runner, found, constants = case
    given = samples(3)
    moments = moments_of(found, runner, constants, given)
    for layer in found:
        weight = constants[layer.weight].array
        rows = weight.reshape(len(weight), -1)
        assert isinstance(moments[layer.name], Moments)
        outputs = np.concatenate(
            [
                dict(runner.values(sample))[layer.operation.outputs[0].name].reshape(1, len(weight), -1)
                for sample in given
            ]
        ).astype(np.float64)
        (bias,) = layer.operation.inputs["bias"]
        without = outputs - constants[str(bias)].array[:, None]
        np.testing.assert_allclose(
            moments[layer.name].mean_square_change(rows), np.square(without).mean((0, 2)), rtol=1e-4
        )
