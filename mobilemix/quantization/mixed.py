"""From a target's float graph to the cheapest mixed precision within a limit, and a report of how it was found."""

import dataclasses
import importlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mobilemix.errors import InputError
from mobilemix.evaluation import UNKNOWN, truth_of
from mobilemix.quantization.data import form_of, open_dataset
from mobilemix.quantization.report import FLOAT, Report
from mobilemix.quantization.search import Judge, find, savings
from mobilemix.quantization.sensitivity import Quantizable, Run, sensitivities
from mobilemix.recipe import Recipe
from mobilemix.signature import outputs_of
from mobilemix.targets.base import Inputs, Lowered

JUDGED = 512
"""Samples of the user's data on which choices are judged, where no number is given."""
TIMED = 20
"""Runs of each configuration, one after the other in turn, of which its time is the median."""


MIXING = {
    "coreml": "mobilemix.targets.coreml.candidates:Candidates",
    "onnx": "mobilemix.targets.onnx.candidates:Candidates",
}
"""Of the targets whose layers can be left in float one by one, what makes a `Quantizable` of a lowered program."""


def quantizable(lowered: Lowered, recipe: Recipe, folder: Path) -> Quantizable:
    """A program as the recipe's target quantises it.

    Args:
        lowered: after the target's own passes.
        recipe: of the artifact, all its defaults resolved.
        folder: for the float graph, as long as the result is used.

    Raises:
        InputError: a target or a precision that cannot mix.
        MobilemixError: what `Target.compile` raises.
    """
    if recipe.target not in MIXING:
        valid = " and ".join(MIXING)
        raise InputError(f"the search mixes precisions for {valid}; export {recipe.target} with --layer PATTERN=float")
    module, name = MIXING[recipe.target].split(":")
    made: Quantizable = getattr(importlib.import_module(module), name)(lowered, recipe, folder)
    return made


def judged(lowered: Lowered, data: Path, count: int | None, seed: int) -> tuple[list[Inputs], list[int] | None]:
    """Samples of a data set, and the class of each if it has them; of labelled data those without are left out.

    Args:
        lowered: the model.
        data: see `mobilemix.quantization.data.open_dataset`.
        count: at most so many, `JUDGED` if None.
        seed: of the choice among more.

    Raises:
        InputError: data that cannot be read, or does not fit the model.
    """
    form = form_of(lowered)
    if form.size != 1:
        raise InputError(f"accuracy is measured on one sample at a time, not on {form.size}; export a batch of 1")
    shape, _ = outputs_of(lowered.program)[0]
    dataset = open_dataset(data, form)
    truth = truth_of(dataset, data, lowered.labels, shape[1] if len(shape) == 2 and shape[0] == 1 else 0)
    found = [each for chunk in dataset.read(count or JUDGED, seed) for each in chunk]
    if truth is None:
        return [sample for _, sample in found], None
    known = [(int(truth.classes[number]), sample) for number, sample in found if truth.classes[number] != UNKNOWN]
    return [sample for _, sample in known], [label for label, _ in known]


def investigate(
    subject: Quantizable,
    samples: Sequence[Inputs],
    judge: Judge,
    *,
    objective: str,
    max_drop: float,
    progress: Callable[[str], None],
    recipe: Recipe,
    model: str,
) -> Report:
    """Measure every layer, and search.

    Args:
        subject: the float graph.
        samples: what it was calibrated on, of which so many are taken as the float graph has time for.
        judge: of the choices.
        objective: of `mobilemix.quantization.search.OBJECTIVES`.
        max_drop: largest loss of the judge's score, from 0 to 1.
        progress: told what is done, and on which layer.
        recipe: of the artifact.
        model: its name.

    Raises:
        UnknownNameError: the objective.
        InputError: no choice keeps within the limit.
    """
    savings(subject.layers, objective)  # a wrong name should not cost minutes
    found = sensitivities(subject, samples[:: -(-len(samples) // subject.measured)], progress)
    choice = find(subject, found, judge, objective, max_drop, progress)
    report = Report(
        model=model,
        target=recipe.target,
        precision=str(recipe.precision),
        objective=objective,
        measure=judge.measure,
        samples=len(judge.samples),
        max_drop=max_drop,
        reference=judge.reference,
        sensitivities=tuple(found),
        choice=choice,
    )
    if any(layer.seconds is None for layer in subject.layers):
        return report
    progress("timing")
    kept = {name: names for name, (names, _) in report.configurations.items()}
    runs = {name: subject.runner(names) if name != FLOAT else subject.reference() for name, names in kept.items()}
    return dataclasses.replace(report, seconds=_seconds(runs, samples[0]))


def _seconds(runs: Mapping[str, Run], sample: Inputs) -> dict[str, float]:
    """Of each, in turn, so that what else the machine does is the same for all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(TIMED):
        for name, run in runs.items():
            start = time.perf_counter()
            run(sample)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}
