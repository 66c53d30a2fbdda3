"""What an export does once stays done once. Nothing here measures time, which whatever else is running would change."""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from mobilemix import api, parity
from mobilemix.passes import PASSES, editing, lower
from mobilemix.recipe import Recipe
from mobilemix.threads import spread

HEAVY = ("torch", "numpy", "onnx", "onnxruntime", "onnxscript", "onnxsim", "coremltools", "PIL")
NEEDLESS = ("transformers", "coremltools.optimize.torch", "torch.distributed.fsdp")


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.GELU())
        self.head = nn.Linear(8, 5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(image).mean((2, 3)))


def imported(statement: str, names: tuple[str, ...]) -> list[str]:
    """Which of the modules a new process has after a statement."""
    code = f"import sys\n{statement}\nprint(*(name for name in {names!r} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1].split()


def counted(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> list[object]:
    """First arguments of the calls of a function, from now on."""
    calls: list[object] = []
    function: Callable[..., object] = getattr(owner, name)

    def call(*arguments: object, **options: object) -> object:
        calls.append(arguments[0])
        return function(*arguments, **options)

    monkeypatch.setattr(owner, name, call)
    return calls


def test_help_imports_nothing_heavy() -> None:
    asked = "from typer.testing import CliRunner; from mobilemix.cli import app; CliRunner().invoke(app, ['--help'])"
    assert imported(asked, HEAVY) == []


def test_coremltools_comes_without_its_optimisers() -> None:
    assert imported("import mobilemix.targets.coreml", ("coremltools", *NEEDLESS)) == ["coremltools"]


def test_the_optimisers_are_there_for_who_asks() -> None:
    asked = (
        "import mobilemix.targets.coreml; from coremltools.optimize.torch.palettization import PostTrainingPalettizer"
    )
    assert imported(asked, ("coremltools.optimize.torch",)) == ["coremltools.optimize.torch"]


def test_a_core_ml_export_converts_each_precision_once_and_runs_the_source_once_a_sample(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mobilemix.targets.coreml import convert, target
    from mobilemix.targets.coreml.executor import Executor

    conversions = counted(monkeypatch, convert.ct, "convert")
    references = counted(monkeypatch, api, "reference")
    lowered_references = counted(monkeypatch, parity, "program_reference")
    executions = counted(monkeypatch, Executor, "_execute")
    reads = counted(monkeypatch, target, "read_package")
    export = api.export(Classifier(), target="coreml", input_shapes=((1, 3, 12, 12),), output=tmp_path)
    assert export.parity.passed
    assert len(conversions) == 2, "float16, and the float32 that it is compared with"
    assert conversions[0] is conversions[1], "the program is prepared for coremltools once"
    sets = export.parity.agreement.values()
    assert len(references) == 1, "one copy of the source in float64"
    assert len(lowered_references) == 1
    assert len(executions) == sum(one.samples for one in sets) + len(sets), "each set's last sample in float32 as well"
    assert len(reads) <= 4


def test_an_onnx_export_opens_its_file_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mobilemix.targets.onnx import convert, runtime

    traces = counted(monkeypatch, convert, "trace")
    sessions = counted(monkeypatch, runtime, "_open")
    export = api.export(Classifier(), target="onnx", input_shapes=((1, 3, 12, 12),), output=tmp_path)
    assert export.parity.passed
    assert not traces, "onnxsim finds nothing to do, which the graphs themselves show"
    assert len(sessions) == 2, "the artifact with and without optimisation"


def test_passes_copy_the_graph_once(monkeypatch: pytest.MonkeyPatch) -> None:
    program = torch.export.export(Classifier().eval(), (torch.zeros(1, 3, 12, 12),))
    before = str(program.graph)
    made = counted(monkeypatch, editing.ExportedProgram, "validate")
    copies = counted(monkeypatch, editing.copy, "deepcopy")
    lowered = lower(program, PASSES)
    graphs = [graph for graph in copies if isinstance(graph, torch.fx.Graph)]
    assert len(graphs) == 2, "the captured one, and the tentative one of reroll_loops"
    assert len(made) == 1, "the one that comes out"
    assert str(program.graph) == before
    assert torch.allclose(lowered.module()(torch.ones(1, 3, 12, 12)), program.module()(torch.ones(1, 3, 12, 12)))


def test_samples_are_evaluated_side_by_side_on_one_thread_each() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = threading.Barrier(2, timeout=60)  # breaks if one has to wait for the other

        def square(number: int) -> tuple[int, int]:
            together.wait()
            return number**2, torch.get_num_threads()

        assert spread(square, [2, 3]) == [(4, 1), (9, 1)]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_samples_share_weights_but_no_state() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.users: set[int] = set()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.users.add(threading.get_ident())
            assert len(self.users) == 1
            return x * self.weight

    module = Counting()
    samples = parity.noise([parity.Input("x", (1, 2))], 6)
    answers = parity.reference(module, samples).outputs
    assert not module.users
    for sample, (answer,) in zip(samples, answers, strict=True):
        assert (answer == sample["x"].astype("float64")).all()


def test_references_are_computed_once_for_all_targets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    references = counted(monkeypatch, api, "reference")
    recipe = Recipe(model="Classifier", target="onnx", input_shapes=((1, 3, 12, 12),))
    prepared = api.prepare(recipe, module=Classifier())
    for name in ("onnx", "coreml"):
        export = api.deploy(
            prepared, Recipe(model="Classifier", target=name, input_shapes=recipe.input_shapes), tmp_path
        )
        assert export.parity.passed
    assert len(references) == 1, "once for all targets"
