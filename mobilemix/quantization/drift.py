"""How far the rounding of each value moves a model's outputs: which values 8 bits hold, and which stay in float.

An error e in a value moves the outputs by J e, to first order, J their Jacobian at the float model. For a random vector
u of independent numbers of variance one the mean of (uᵀJ e)² is ‖J e‖², and one backward pass gives uᵀJ of all values
at once. e is what the grid makes of a sample's value, clipped numbers and all. No value is rounded meanwhile: one that
8 bits spoil would take the others away from where the model is. PTQ4ViT (arXiv 2111.12293, section 3.3) weighs errors
by squared gradients instead, number by number, which leaves out that all of a channel may err to one side.

Noise in the value itself tells less: of a trained DualToken-ViT, one value of which 8 bits leave 24 dB makes nearly all
of the error, while values of a CAS-ViT of which they leave as little as that hardly matter.
"""

import dataclasses
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
come on top, and what is beyond the first order: on other pictures than the samples, an AFFNet, a CAS-ViT and a
DualToken-ViT are 1.2, 1.6 and 0.6 % off."""
HELD = 0.012
"""Relative L2 of the error in a value with which 8 bits hold it whatever comes of it: 256 steps over the nine
standard deviations that normal numbers span err by 0.010. Of small models, much would stay in float otherwise."""
SAMPLES = 32
"""So many of the samples are looked at: estimates of ‖J e‖ have a standard deviation of an eighth."""


@dataclasses.dataclass(frozen=True)
class Drift:
    """What the rounding of one value does.

    Attributes:
        outputs: relative L2 by which it alone moves the outputs, root mean square of samples and outputs.
        value: relative L2 of the error in the value itself.
    """

    outputs: float
    value: float


class Probe:
    """Collects the roundings of one evaluation; see `drifts`."""

    def __init__(self) -> None:
        """None is known yet."""
        self.points: list[tuple[str, Tensor, Tensor]] = []
        """Name of a value, the value as those get it who would read it rounded, and the error that they would get."""

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


def drifts(evaluate: Evaluate, samples: Sequence[Inputs]) -> dict[str, Drift]:
    """What the rounding of each value does, by name.

    Args:
        evaluate: passes every value that it rounds through `Probe.round`.
        samples: typical inputs, of which `SAMPLES` are looked at.
    """
    some = samples[:: -(-len(samples) // SAMPLES)]
    total: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    with counting("sample for the drift of outputs", len(some)) as step:

        def measure(numbered: tuple[int, Inputs]) -> dict[str, Tensor]:
            found = _squares(evaluate, *numbered)
            step(1)
            return found

        for found in spread(measure, list(enumerate(some))):
            for name, squares in found.items():
                total[name] += squares
    return {
        name: Drift(outputs=math.sqrt(moved / len(some)), value=math.sqrt(error / (energy or 1.0)))
        for name, (moved, error, energy) in ((name, squares.tolist()) for name, squares in total.items())
    }


def _squares(evaluate: Evaluate, seed: int, sample: Inputs) -> dict[str, Tensor]:
    """For each value, an estimate of the squared relative drift of the outputs, and the energies of error and value."""
    probe = Probe()
    with torch.enable_grad():
        outputs = [each for each in evaluate(sample, probe) if each.requires_grad]
    found: dict[str, Tensor] = defaultdict(lambda: torch.zeros(3, dtype=torch.float64))
    if outputs and probe.points:
        generator = torch.Generator().manual_seed(seed)
        directions = [torch.randn(each.shape, generator=generator) / _norm(each) for each in outputs]
        places = [result for _, result, _ in probe.points]
        gradients = torch.autograd.grad(outputs, places, directions, allow_unused=True)
        for (name, value, error), gradient in zip(probe.points, gradients, strict=True):
            moved = torch.zeros(()) if gradient is None else (gradient.double() * error.double()).sum()
            found[name] += torch.stack([moved, error.double().square().sum(), value.detach().double().square().sum()])
    for squares in found.values():  # places of one name err together
        squares[0] = squares[0] ** 2 / len(outputs)
    return found


def _norm(output: Tensor) -> float:
    return float(output.detach().double().norm()) or 1.0


def unheld(found: Mapping[str, Drift], most: float) -> frozenset[str]:
    """Names of the values to leave in float: as few as leave the others a drift of at most `most` together.

    Those that 8 bits hold, see `HELD`, are never among them.

    Args:
        found: see `drifts`; errors are taken to be independent, so that their squares add up.
        most: relative L2.
    """
    left = {name: each.outputs**2 if math.isfinite(each.outputs) else math.inf for name, each in found.items()}
    lost = set()
    for name in sorted((name for name in left if not found[name].value <= HELD), key=left.__getitem__, reverse=True):
        if sum(left.values()) <= most**2:
            break
        del left[name]
        lost.add(name)
    return frozenset(lost)
