"""Inspection of a model: capture it, ask every exporter's registry, run the passes one at a time, and count."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import nn
from torch.export import ExportedProgram

from mobilemix import api
from mobilemix.errors import UnsupportedOpError
from mobilemix.inspection import obstacles
from mobilemix.inspection.costs import cost, shares
from mobilemix.inspection.report import Contributor, ModelReport, Share, TargetReport, Value
from mobilemix.passes import PASSES, SHARED, Pass, lower
from mobilemix.recipe import Recipe
from mobilemix.signature import inputs_of, outputs_of
from mobilemix.source import load_source
from mobilemix.targets import find_target, is_installed


def inspect_model(
    recipe: Recipe, *, module: nn.Module | None = None, listener: Callable[[str], None] = lambda _stage: None
) -> ModelReport:
    """Inspect a recipe's model; `module` is used in its place where a notebook already has one.

    Nothing is exported and no value is computed: the answers come from the captured program and the registries of
    coremltools and torch.onnx.

    Raises:
        MobilemixError: the model cannot be loaded or captured (see `mobilemix.errors`).
    """
    listener("load")
    source = load_source(recipe, module)
    listener("capture")
    program = api.capture_source(source)
    listener("rewrite")
    shared = _Walk(program).on(SHARED)
    walk = shared.on(PASSES[len(SHARED) :])
    targets = []
    for name in filter(is_installed, obstacles.EXPORTERS):
        listener(f"what {name} takes")
        targets.append(_target(name, program, shared))
    listener("count")
    before, after = shares(program), shares(walk.program)
    return ModelReport(
        model=source.name,
        weights=source.weights,
        parameters=sum(parameter.numel() for parameter in source.module.parameters()),
        inputs=tuple(Value(each.name, each.dtype, each.shape) for each in inputs_of(program)),
        outputs=tuple(
            Value(f"output_{index}", dtype, shape) for index, (shape, dtype) in enumerate(outputs_of(program))
        ),
        before=cost(program, before),
        after=cost(walk.program, after) if walk.refusal is None else None,
        targets=tuple(targets),
        contributors=_contributors(before, after if walk.refusal is None else before),
        refusal=walk.refusal,
    )


@dataclasses.dataclass(frozen=True)
class _Walk:
    """A program on its way through some passes.

    Attributes:
        program: as far as they came.
        steps: each pass that changed something, with the program after it.
        refusal: what the pass said that stopped.
    """

    program: ExportedProgram
    steps: tuple[tuple[str, ExportedProgram], ...] = ()
    refusal: str | None = None

    def on(self, passes: Sequence[Pass]) -> "_Walk":
        """Further through other passes, unless one has stopped already."""
        program, steps = self.program, list(self.steps)
        if self.refusal is not None:
            return self
        for step in passes:
            try:
                result = lower(program, (step,))
            except UnsupportedOpError as error:
                return _Walk(program, tuple(steps), str(error))
            if result is not program:
                program = result
                steps.append((step.name, program))
        return _Walk(program, tuple(steps))


def _target(name: str, program: ExportedProgram, shared: _Walk) -> TargetReport:
    stock, own = (exporter() for exporter in obstacles.EXPORTERS[name])
    walk = shared.on(find_target(name).passes)
    in_the_way = obstacles.find(program, stock)
    remaining = obstacles.find(walk.program, own)
    handled: dict[tuple[str, str, str], str] = {}
    for step, result in walk.steps:
        left = obstacles.find(result, stock)
        for key in in_the_way.keys() - left.keys() - handled.keys():
            handled[key] = step
    if walk.refusal is None:
        for key in in_the_way.keys() - remaining.keys() - handled.keys():
            handled[key] = f"the {name} target's converter"
    return TargetReport(
        target=name,
        exporter=stock.name,
        obstacles=obstacles.summarise(in_the_way, handled.get),
        remaining=obstacles.summarise(remaining, lambda _key: None),
        passes=tuple(dict.fromkeys(step for step, _ in walk.steps)),
    )


def _contributors(before: Mapping[str, Share], after: Mapping[str, Share]) -> tuple[Contributor, ...]:
    modules = dict.fromkeys((*before, *after))
    found = [Contributor(module, before.get(module, Share()), after.get(module, Share())) for module in modules]
    return tuple(sorted(found, key=lambda one: (-one.after.multiply_adds, -one.after.moved_bytes)))
