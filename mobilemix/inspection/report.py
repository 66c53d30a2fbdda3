"""What an inspection finds, as plain frozen data: the tables and `--json` say the same."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mobilemix.targets.tensorrt.precision import Layer


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a graph is made of and what one run of it needs.

    Attributes:
        operators: how often each operator occurs, the most frequent first.
        weights: numbers in the parameters, buffers and constants that it reads.
        weight_bytes: their bytes.
        multiply_adds: of convolutions, linear maps, matrix products, Einstein sums and attention, each counted once.
            Fourier transforms and scans count nothing while they are operators, because what they cost is decided by
            whoever lowers them. None where a shape is not known.
        moved_bytes: activations that operators read and write; operators that only look at a tensor differently
            (reshape, view, slice …) move nothing. None where a shape is not known.
    """

    operators: Mapping[str, int]
    weights: int
    weight_bytes: int
    multiply_adds: int | None
    moved_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Value:
    """An input or output: its name, element type, and size along each axis (a name or None for one left open)."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """An operator that something on the way to a device does not take.

    Attributes:
        operator: as the graph calls it.
        stops: who does not take it: "coremltools", "torch.onnx", "ONNX Runtime", "TensorRT" …
        reason: what is missing.
        count: how often the graph has it.
        places: the lines of the user's source that ask for it.
        handled_by: the pass of mobilemix after which it is gone, or the target whose converter takes it; None if it
            stays in the way.
    """

    operator: str
    stops: str
    reason: str
    count: int
    places: tuple[str, ...] = ()
    handled_by: str | None = None


@dataclasses.dataclass(frozen=True)
class TargetReport:
    """One target: what its stock exporter does not take of the captured model, and what stays after our passes.

    Attributes:
        target: a name in `mobilemix.targets.TARGETS`.
        exporter: the stock one, with its version.
        obstacles: before our passes.
        remaining: after them; empty means that `mobilemix export` has an operator for everything.
        passes: ours that change something on the way to this target.
    """

    target: str
    exporter: str
    obstacles: tuple[Obstacle, ...]
    remaining: tuple[Obstacle, ...]
    passes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Share:
    """What one module contributes: operators, multiply-adds, bytes of activations moved."""

    operators: int = 0
    multiply_adds: int = 0
    moved_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Contributor:
    """A module of the user's by its path, "" for the outermost; what it contributes before and after our passes."""

    module: str
    before: Share
    after: Share


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """A model: what stands between it and each target, and what it costs.

    Attributes:
        model: its name.
        weights: where they came from (see `mobilemix.source.Source`).
        parameters: of the module.
        inputs, outputs: of the captured program.
        before: the captured program.
        after: the same after `mobilemix.passes.lower`; None if it was refused.
        targets: one report each.
        contributors: every module that computes something, by what it costs after the passes (before, if refused).
        refusal: why our passes stopped, and what to change; None if they did not.
    """

    model: str
    weights: str
    parameters: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    before: Cost
    after: Cost | None
    targets: tuple[TargetReport, ...]
    contributors: tuple[Contributor, ...]
    refusal: str | None


@dataclasses.dataclass(frozen=True)
class Precision:
    """What computes in one precision: layers, and multiply-adds of one run, None where a size is open."""

    layers: int
    multiply_adds: int | None


@dataclasses.dataclass(frozen=True)
class ArtifactReport:
    """An ONNX file, a Core ML package or a LiteRT file.

    Attributes:
        path: where it is.
        form: "ONNX opset 18", "ML Program for iOS 16" …
        bytes: on disk, with the files beside it.
        inputs, outputs: in order.
        cost: of one run.
        weight_dtypes: bytes of weights by element type.
        provenance: what mobilemix wrote into it about its making; None in files of other origin.
        obstacles: what keeps it from running elsewhere.
        precisions: of an ONNX file, by name.
        layers: of an ONNX file, in order.
    """

    path: str
    form: str
    bytes: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    cost: Cost
    weight_dtypes: Mapping[str, int]
    provenance: Mapping[str, Any] | None
    obstacles: tuple[Obstacle, ...]
    precisions: Mapping[str, Precision] = dataclasses.field(default_factory=dict)
    layers: tuple[Layer, ...] = ()


def provenance(text: str | None) -> Mapping[str, Any] | None:
    """What mobilemix wrote into an artifact's metadata; None for any other text."""
    try:
        table = json.loads(text or "null")
    except ValueError:
        return None
    return table if isinstance(table, dict) else None
