"""How far the rounding of each value moves a model's outputs: which values 8 bits hold, and which stay in float.

An error e in a value moves the outputs by J e, to first order, J their Jacobian at the float model. For a random vector
u of independent numbers of variance one the mean of (uᵀJ e)² is ‖J e‖², and one backward pass gives uᵀJ of all values
at once. e is what the grid makes of a sample's value, clipped numbers and all. No value is rounded meanwhile: one that
8 bits spoil would take the others away from where the model is. PTQ4ViT (arXiv 2111.12293, section 3.3) weighs errors
by squared gradients instead, number by number, which leaves out that all of a channel may err to one side.

Noise in the value itself tells less: of a trained DualToken-ViT, one value of which 8 bits leave 24 dB makes nearly all
of the error, while values of a CAS-ViT of which they leave as little as that hardly matter.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mobilemix.progress import counting
from mobilemix.targets.base import Inputs
from mobilemix.threads import spread

MOST = 0.01
"""Relative L2 by which the rounding of all values together may move the outputs, to first order. The weights' errors
come on top, and what is beyond the first order: on other pictures than the samples, classifiers of the four families
are 0.5 to 1.6 % off."""
SAMPLES = 32
"""So many of the samples are looked at: estimates of ‖J e‖ have a standard deviation of an eighth."""


class Probe:
    """Collects the roundings of one evaluation; see `drifts`."""

    def __init__(self) -> None:
        """None is known yet."""
        self.points: list[tuple[str, Tensor, Tensor]] = []
        """Name of a value, as those get it who would read it rounded, and the error that they would get."""

    def round(self, name: str, exact: Tensor, rounded: Tensor) -> Tensor:
        """What readers get in place of `rounded`: the numbers of `exact`.

        Args:
            name: of the value; those that are rounded alike may share one.
            exact: before rounding.
            rounded: after it, of the same shape.
        """
        result = exact.view_as(exact) if exact.requires_grad else exact.detach().requires_grad_()
        self.points.append((name, result, (rounded - exact).detach()))
        return result


Evaluate = Callable[[Inputs, Probe], Sequence[Tensor]]
"""A model with rounded values: what it answers to a sample. Gradients are recorded; threads may share it."""


def drifts(evaluate: Evaluate, samples: Sequence[Inputs]) -> dict[str, float]:
    """Relative L2 by which the rounding of each value alone moves the outputs: root mean square of samples and outputs.

    Args:
        evaluate: passes every value that it rounds through `Probe.round`.
        samples: typical inputs, of which `SAMPLES` are looked at.
    """
    some = samples[:: -(-len(samples) // SAMPLES)]
    total: dict[str, float] = defaultdict(float)
    with counting("sample for the drift of outputs", len(some)) as step:

        def measure(numbered: tuple[int, Inputs]) -> dict[str, float]:
            found = _squares(evaluate, *numbered)
            step(1)
            return found

        for found in spread(measure, list(enumerate(some))):
            for name, square in found.items():
                total[name] += square / len(some)
    return {name: math.sqrt(square) for name, square in total.items()}


def _squares(evaluate: Evaluate, seed: int, sample: Inputs) -> dict[str, float]:
    """One estimate of the squared relative drift for each value."""
    probe = Probe()
    with torch.enable_grad():
        outputs = [each for each in evaluate(sample, probe) if each.requires_grad]
    sums: dict[str, float] = defaultdict(float)
    if outputs and probe.points:
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(each.shape, generator=generator) / _norm(each) for each in outputs]
        places = [result for _, result, _ in probe.points]
        gradients = torch.autograd.grad(outputs, places, directions, allow_unused=True)
        for (name, _, error), gradient in zip(probe.points, gradients, strict=True):
            sums[name] += 0.0 if gradient is None else float((gradient.double() * error.double()).sum())
    return {name: each**2 / len(outputs) for name, each in sums.items()}


def _norm(output: Tensor) -> float:
    return float(output.detach().double().norm()) or 1.0


def unheld(found: Mapping[str, float], most: float) -> frozenset[str]:
    """Names of the values to leave in float: as few as leave the others a drift of at most `most` together.

    Args:
        found: see `drifts`; errors are taken to be independent, so that their squares add up.
        most: relative L2.
    """
    left = {name: drift**2 if math.isfinite(drift) else math.inf for name, drift in found.items()}
    lost = set()
    for name in sorted(left, key=left.__getitem__, reverse=True):
        if sum(left.values()) <= most**2:
            break
        del left[name]
        lost.add(name)
    return frozenset(lost)
