"""Checks of a compressed package: it is the float32 build with these weights in few bits and these values rounded.

Compression is read back from the file and carried out on the float32 build, in memory. The two programs are then
compared as an fp16 package and its build are, bit for bit, and so are their outputs.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from mobilemix import parity
from mobilemix.quantization.sensitivity import sqnr
from mobilemix.recipe import Recipe
from mobilemix.targets.base import Array, Check, Inputs, Lowered, Runner
from mobilemix.targets.coreml.compression import Compression
from mobilemix.targets.coreml.layers import layers
from mobilemix.targets.coreml.package import Package
from mobilemix.targets.coreml.plan import by_weight, choose
from mobilemix.targets.coreml.weights import bits_of

SIMULATED_RELATIVE_L2 = 5e-2
"""How far a package may be from the simulation in float32: float16 between layers, which moves numbers near the middle
of two steps to the other one."""

LEAST_SQNR = 15.0
"""Of a value that is rounded, in dB: 8 bits that span it leave 25 to 50; a wrong zero point or scale clips it."""


def weights_check(found: Compression, build: Package, lowered: Lowered, recipe: Recipe) -> Check:
    """Whether those weights are compressed that should be, to so many bits, each to the nearest of its numbers."""
    name = "compressed weights"
    wanted = by_weight(choose(layers(build, lowered), recipe))
    if wrong := sorted(wanted.keys() ^ found.weights.keys()):
        what = "is not" if wrong[0] in wanted else "should not be"
        return Check(name, False, f"'{wrong[0]}' {what} compressed")
    constants = {each.outputs[0].name: each.attributes["val"] for each in build.operations if each.type == "const"}
    steps = 1.0 if recipe.quantization.rounding == "adaround" else 0.5
    noise = {}
    for constant, weight in found.weights.items():
        layer, precision = wanted[constant]
        if weight.bits != bits_of(precision, layer.shape):
            return Check(name, False, f"'{constant}' has {weight.bits} bits, not those of {precision}")
        content = constants[constant].array
        beyond = weight.excess(content, steps)
        if not beyond.max() <= 0:
            place = tuple(int(index) for index in np.unravel_index(int(beyond.argmax()), beyond.shape))
            detail = f"'{constant}' has {weight.dense[place]:.5g} for {content[place]:.5g} at {list(place)}"
            return Check(name, False, f"{detail}, of which a nearer one can be stored")
        noise[layer.name] = sqnr([weight.dense], [content])
    worst = min(noise, key=lambda layer: noise[layer])
    return Check(
        name,
        True,
        f"{len(noise)} weights at the nearest of their numbers; least SQNR {noise[worst]:.1f} dB in '{worst}'"
        if steps < 1
        else f"{len(noise)} weights next to the float ones; least SQNR {noise[worst]:.1f} dB in '{worst}'",
    )


def values_check(found: Compression, build: Runner, simulation: Runner, sample: Inputs) -> Check:
    """Whether the grids of rounded values hold what a sample has, and what is left of every layer's output."""
    name = "rounded values"
    outputs = dict.fromkeys(found.layers)
    expected = {key: value for key, value in build.values(sample) if key in outputs}
    seen = {key: value for key, value in sample.items() if key in found.values}  # the program's own inputs
    own, layered = {}, {}
    for key, value in simulation.values(sample):
        if key in found.values:
            seen[key] = value
        elif (source := key.removesuffix("_dequantized")) in seen:
            own[source] = sqnr([value], [seen.pop(source)])
        if key in expected:
            layered[key] = sqnr([value], [expected[key]])
    worst, last = min(own, key=lambda key: own[key]), min(layered, key=lambda key: layered[key])
    return Check(
        name,
        own[worst] >= LEAST_SQNR,
        f"{len(own)} values in 8 bits, least SQNR {own[worst]:.1f} dB in '{worst}', at least {LEAST_SQNR:g}; "
        f"of the layers' outputs with all that comes before, {layered[last]:.1f} dB in '{last}'",
    )


def simulation_check(answers: Sequence[Mapping[str, Array]], expected: Sequence[Mapping[str, Array]]) -> Check:
    """Whether the package computes what the simulation in float32 does."""
    outputs, references = ([list(answer.values()) for answer in each] for each in (answers, expected))
    error = parity.compare(outputs, references).relative_l2
    return Check(
        "simulation",
        error <= SIMULATED_RELATIVE_L2,
        f"relative L2 {error:.1e} from the float32 build with these weights and values, "
        f"at most {SIMULATED_RELATIVE_L2:.0e}",
    )
