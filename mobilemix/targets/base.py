"""What every target is: a compiler from a lowered program to a file, a way to run that file, and its tolerances."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.export import ExportedProgram

from mobilemix.passes import Pass
from mobilemix.preprocess import Preprocess
from mobilemix.recipe import Recipe

Array = np.ndarray
Inputs = Mapping[str, Array]

LARGEST_HALF = float(np.finfo(np.float16).max)
"""Largest finite float16, 65504."""


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A captured and rewritten model with what its deployment needs to know.

    Attributes:
        name: model name; file names and metadata use it.
        program: float32, eval mode, fixed shapes; no complex tensor, FFT or training-time op is left.
        input_names: names of the program's user inputs.
        output_names: names of its user outputs.
        complex_names: inputs and outputs that are complex in the source; here their last axis is [re, im], float32.
        mean, std: per-channel normalisation x = (pixel / 255 − mean) / std that an image input must apply;
            None for a model that takes no image.
        crop_pct: share of a resized image that the centre crop to the input keeps (`mobilemix.preprocess`).
        labels: class names of the first output's last axis, or None.
        metadata: what to write into the artifact (author, license, description, paper …).
        dynamic_batch: smallest, most frequent and largest batch, if the artifact leaves it open; the program is for
            the first of a pair of `mobilemix.batches.PAIRS` then.
        larger: the same program for the second of the pair.
        calibration: samples that its user gave in Python to calibrate on, of batch 1; empty where none were given.
    """

    name: str
    program: ExportedProgram
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    labels: tuple[str, ...] | None
    metadata: Mapping[str, str]
    complex_names: frozenset[str] = frozenset()
    dynamic_batch: tuple[int, int, int] | None = None
    larger: ExportedProgram | None = None
    crop_pct: float = Preprocess.crop_pct
    calibration: Sequence[Inputs] = ()


class Runner(Protocol):
    """An artifact that was read back from disk and can be executed here."""

    def run(self, inputs: Inputs) -> dict[str, Array]:
        """Execute on the program's own inputs (arrays of its dtypes, normalised, by `Lowered.input_names`).

        Several threads may call it at once.

        A runner whose artifact takes an image undoes the normalisation and feeds pixels in [0, 255] (float, not
        rounded, so that what is compared is the graph and not 8-bit rounding). Returns float32 outputs by
        `Lowered.output_names`.
        """

    def values(self, inputs: Inputs) -> Iterator[tuple[str, Array]]:
        """Every intermediate value as (name in the graph, float32 array), in execution order; for the bisect."""


@dataclasses.dataclass(frozen=True)
class Check:
    """One verification step that is particular to a target.

    Attributes:
        name: of the step.
        passed: whether it held; None if it could not run.
        detail: what it found, or why it was not run.
    """

    name: str
    passed: bool | None
    detail: str


class Target(Protocol):
    """One entry of `mobilemix.targets.TARGETS`."""

    name: str
    suffix: str
    precisions: tuple[str, ...]
    """Valid precisions, the default first."""
    takes_images: bool
    """Whether an artifact can declare an image as its input, with the normalisation inside."""
    stored_dtypes: Mapping[str, str]
    """Dtypes of inputs and outputs that an artifact of this target holds as another one, by that of the program."""
    passes: tuple[Pass, ...]
    """Rewrites for this target alone, after those that all share; `compile` gets a program that went through both."""

    def compile(self, lowered: Lowered, recipe: Recipe, destination: Path) -> Mapping[str, Any] | None:
        """Write the artifact to `destination`, in a temporary folder from which the caller moves all that is there.

        Returns:
            What the manifest should say of what was built besides the artifact, such as an engine of it, with the names
            of its `files`; None where a target builds nothing besides.

        Raises:
            UnsupportedOpError: an operator that the target does not have.
            TargetError: the target's compiler refused the graph.
        """

    def load(self, path: Path) -> Runner:
        """Read an artifact back from disk.

        Raises:
            InputError: not an artifact of this target, or corrupt.
        """

    def checks(self, lowered: Lowered, recipe: Recipe, path: Path, samples: Sequence[Inputs]) -> list[Check]:
        """Verification beyond comparing outputs; empty where there is none. `samples` are representative inputs."""

    def op_histogram(self, path: Path) -> dict[str, int]:
        """How often each operator type occurs in the artifact's graph."""
