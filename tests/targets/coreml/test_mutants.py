"""Every planted fault is caught, wherever it was planted; a tolerance on the outputs alone would miss some of them."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from coreml_lowered import FP16, FP32, lowered, samples
from coreml_mutants import BITS, VISIBLE, Mutant, flipped_weight_bit, tanh_gelu, wrong_epsilon

from mobilemix import parity
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Check, Lowered
from mobilemix.targets.coreml import target
from mobilemix.targets.coreml.convert import convert
from mobilemix.targets.coreml.equivalence import compare
from mobilemix.targets.coreml.package import read_package


@pytest.fixture(scope="module")
def model() -> Lowered:
    return lowered()


@pytest.fixture(scope="module")
def packages(model: Lowered, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two builds, `fp16.mlpackage` and `fp32.mlpackage`."""
    folder = tmp_path_factory.mktemp("builds")
    for recipe in (FP16, FP32):
        convert(model, recipe, folder / f"{recipe.precision}.mlpackage")
    return folder


@pytest.fixture
def faulty_compiler(packages: Path, monkeypatch: pytest.MonkeyPatch) -> list[Mutant]:
    """Mutants that every conversion from now on will have."""
    mutants: list[Mutant] = []

    def compiled(_lowered: Lowered, recipe: Recipe, destination: Path) -> None:
        shutil.copytree(packages / f"{recipe.precision}.mlpackage", destination)
        for mutant in mutants:
            mutant(destination)

    monkeypatch.setattr(target, "convert", compiled)
    return mutants


def compiled(model: Lowered, folder: Path) -> Path:
    path = folder / "mixer.mlpackage"
    target.CoreMLTarget().compile(model, FP16, path)
    return path


def checks(model: Lowered, path: Path) -> dict[str, Check]:
    return {check.name: check for check in target.CoreMLTarget().checks(model, FP16, path, samples())}


def end_to_end(model: Lowered, path: Path) -> parity.Agreement:
    runner = target.CoreMLTarget().load(path)
    reference = parity.reference(model.program.module(), samples(3))
    outputs: Sequence[Sequence[parity.Array]] = [[runner.run(sample)["logits"]] for sample in samples(3)]
    return parity.compare(outputs, reference.outputs)


def test_control(model: Lowered, faulty_compiler: list[Mutant], tmp_path: Path) -> None:
    path = compiled(model, tmp_path)
    found = checks(model, path)
    assert [(name, check.passed) for name, check in found.items()] == [
        ("fp32 build", True),
        ("fp16 equals fp32", True),
        ("range audit", True),
        ("native", None),
    ]
    assert end_to_end(model, path).within(parity.TIERS["fp16"])


@pytest.mark.parametrize("mutant", [*VISIBLE, *BITS], ids=lambda mutant: mutant.__name__)
def test_a_fault_in_the_saved_package(
    mutant: Mutant, model: Lowered, faulty_compiler: list[Mutant], tmp_path: Path
) -> None:
    path = compiled(model, tmp_path)
    mutant(path)
    found = checks(model, path)
    assert found["fp32 build"].passed, "the build that it is compared with has no fault"
    assert found["fp16 equals fp32"].passed is False
    assert found["range audit"].passed is None


@pytest.mark.parametrize("mutant", VISIBLE, ids=lambda mutant: mutant.__name__)
def test_a_fault_of_the_compiler_in_both_builds(
    mutant: Mutant, model: Lowered, faulty_compiler: list[Mutant], tmp_path: Path
) -> None:
    faulty_compiler.append(mutant)
    found = checks(model, compiled(model, tmp_path))
    assert found["fp16 equals fp32"].passed, "both builds have the same fault"
    assert found["fp32 build"].passed is False


@pytest.mark.parametrize("mutant", [tanh_gelu, wrong_epsilon, flipped_weight_bit], ids=lambda mutant: mutant.__name__)
def test_a_tolerance_on_the_outputs_would_not_do(
    mutant: Mutant, model: Lowered, packages: Path, tmp_path: Path
) -> None:
    path = tmp_path / "mixer.mlpackage"
    shutil.copytree(packages / "fp16.mlpackage", path)
    mutant(path)
    assert end_to_end(model, path).within(parity.TIERS["fp16"])


def test_a_difference_says_where_it_is(packages: Path, tmp_path: Path) -> None:
    path = tmp_path / "mixer.mlpackage"
    shutil.copytree(packages / "fp16.mlpackage", path)
    flipped_weight_bit(path)
    (difference,) = compare(read_package(packages / "fp32.mlpackage"), read_package(path)).differences
    assert "conv" in difference
    assert "weight" in difference
    assert "1 of 324 values" in difference
    assert "[0, 1, 2, 2]" in difference
