"""Channels brought to like ranges before quantisation, so that one scale fits all of a tensor; the outputs stay.

"cross-layer" looks at weights: what a channel weighs with its writers and with its readers becomes the same (Nagel et
al., arXiv 1906.04721, section 4.1). "smooth" looks at values: channels that are large on samples become smaller, and
the weights that read them larger (Xiao et al., arXiv 2211.10438, equation 4). Both choose a factor for each family of
`scales`: a power of two, by which nothing is rounded, so that the program computes the same to the last bit.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from mobilemix.passes.base import arguments
from mobilemix.passes.maps import channel_axis
from mobilemix.quantization.scales import FIXED, Families
from mobilemix.signature import inputs_of
from mobilemix.targets.base import Inputs, Lowered
from mobilemix.threads import spread

ALPHA = 0.5
"""How much of the differences between channels goes from values to weights; 1 is all of it."""
LARGEST, SMALLEST = 8.0, -8.0
"""Binary logarithms of factors."""
HEADROOM = 3.0
"""The same of the largest that is chosen without a look at values: three bits of float16's range."""
SWEEPS = 64
SETTLED = 1e-3
"""Change of every logarithm, in a sweep, at which no more follow."""


def equalize(lowered: Lowered, method: str, samples: Sequence[Inputs]) -> tuple[Lowered, tuple[str, ...]]:
    """A model whose channels have like ranges.

    Args:
        lowered: the model; if its batch is dynamic, both of its programs are scaled alike.
        method: of `options.EQUALIZATIONS`.
        samples: typical inputs, of the program's batch or of one that it is a multiple of.

    Returns:
        The model, and the names of the calls of layers that have other weights now; the very same one and none if no
        layer has.
    """
    if method == "none":
        return lowered, ()
    factors = cross_layer(lowered.program) if method == "cross-layer" else smooth(lowered.program, samples)
    families = Families(lowered.program)
    changed = tuple(
        layer.node.name
        for layer in families.layers
        if (factors[layer.inputs] != 1).any() or (factors[layer.outputs] != 1).any()
    )
    if not changed:
        return lowered, ()
    larger = lowered.larger and Families(lowered.larger).scaled(factors)
    return dataclasses.replace(lowered, program=families.scaled(factors), larger=larger), changed


def cross_layer(program: ExportedProgram) -> Tensor:
    """Factors of a program's families, float64 (count,), that make the weights before and behind them alike.

    The mean logarithm of the largest weight of a channel becomes that of its writers' rows and of its readers' columns.
    A family that no layer's weights write, or none read, has the factor one.
    """
    families = Families(program)
    exponents = torch.zeros(families.count, dtype=torch.float64)
    for _ in range(SWEEPS):
        written, read = _Means(families.count), _Means(families.count)
        for layer in families.layers:
            rows, columns = layer.ranges(exponents.exp2())
            written.add(layer.outputs, rows.log2())
            if layer.reads:
                read.add(layer.inputs, columns.log2())
        change = (read.means() - written.means()).nan_to_num(0) / 2
        before, exponents = exponents, _bounded(exponents + change).clamp_max(HEADROOM)
        if (exponents - before).abs().max() < SETTLED:
            break
    return exponents.round().exp2()


def smooth(program: ExportedProgram, samples: Sequence[Inputs], alpha: float = ALPHA) -> Tensor:
    """Factors of a program's families, float64 (count,), that make channels alike which are not so on samples.

    Each layer asks for its inputs c_j · max|w_j|^(1−α) / max|x_j|^α, c such that the largest of all stays as large as
    it was. A family has the geometric mean of what its readers ask for. The weights of depthwise convolutions do not
    count: each of their rows, which has a scale of its own, reads one channel.

    Args:
        program: the program.
        samples: typical inputs, of the program's batch or of one that it is a multiple of.
        alpha: see `ALPHA`.
    """
    families = Families(program)
    readers = [layer for layer in families.layers if layer.reads and (layer.inputs != FIXED).any()]
    values = {layer.node: arguments(layer.node)["input"].name for layer in readers}
    peaks = _peaks(program, {values[layer.node]: channel_axis(layer.node) for layer in readers}, samples)
    asked = _Means(families.count)
    for layer in readers:
        peak = peaks[values[layer.node]].log2()
        _, columns = layer.ranges(torch.ones(families.count, dtype=torch.float64))
        weight = torch.zeros_like(columns) if layer.is_depthwise else columns.log2()
        wanted = (1 - alpha) * weight - alpha * peak
        # Channels that are always zero, or that no weight reads, ask for nothing.
        wanted = wanted.where(wanted.isfinite(), torch.nan)
        largest = torch.nan_to_num(wanted + peak, -torch.inf).max()
        asked.add(layer.inputs, wanted + peak.max() - largest)
    return _bounded(asked.means().nan_to_num(0)).round().exp2()


class _Means:
    """The mean of what is added for each family; not a number for those with nothing."""

    def __init__(self, count: int) -> None:
        self._sums = torch.zeros(count, dtype=torch.float64)
        self._counts = torch.zeros(count, dtype=torch.float64)

    def add(self, families: Tensor, numbers: Tensor) -> None:
        """Take finite numbers into account."""
        finite = numbers.isfinite()
        self._sums.index_add_(0, families[finite], numbers[finite])
        self._counts.index_add_(0, families[finite], torch.ones_like(numbers[finite]))

    def means(self) -> Tensor:
        """Of each family."""
        return self._sums / self._counts


def _bounded(exponents: Tensor) -> Tensor:
    bounded = exponents.clamp(SMALLEST, LARGEST)
    bounded[FIXED] = 0
    return bounded


def _peaks(program: ExportedProgram, axes: Mapping[str, int], samples: Sequence[Inputs]) -> dict[str, Tensor]:
    """Largest magnitude of each channel of some values on samples, float64.

    Args:
        program: the program.
        axes: of the channels, by the values' names.
        samples: see `smooth`.
    """
    held = {**program.constants, **program.state_dict}
    shapes = {each.name: each.shape for each in inputs_of(program)}

    def look(sample: Inputs) -> dict[str, Tensor]:
        given = {name: torch.from_numpy(_tiled(value, shapes[name])) for name, value in sample.items()}
        arguments = [
            given[spec.arg.name] if spec.kind is InputKind.USER_INPUT else held[str(spec.target)]
            for spec in program.graph_signature.input_specs
        ]
        recorder = _Recorder(program.graph_module, axes)
        with torch.no_grad():
            recorder.run(*arguments, enable_io_processing=False)
        return recorder.peaks

    found = spread(look, samples)
    return {name: torch.stack([peaks[name] for peaks in found]).amax(0) for name in axes}


class _Recorder(fx.Interpreter):
    """Runs a program and keeps the largest magnitude of each channel of some values."""

    def __init__(self, module: fx.GraphModule, axes: Mapping[str, int]) -> None:
        super().__init__(module)
        self._axes = axes
        self.peaks: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if n.name in self._axes:
            self.peaks[n.name] = result.detach().abs().movedim(self._axes[n.name], 0).flatten(1).amax(1).double()
        return result


def _tiled(value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A sample as often as a batch has room for it."""
    return value if value.shape == shape else np.tile(value, [shape[0] // len(value)] + [1] * (value.ndim - 1))
