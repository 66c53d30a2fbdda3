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
from mobilemix.targets.coreml.compress import DEQUANTIZED
from mobilemix.targets.coreml.compression import HALF, Compression
from mobilemix.targets.coreml.layers import layers
from mobilemix.targets.coreml.package import Package
from mobilemix.targets.coreml.plan import Rounded, by_weight, choose
from mobilemix.targets.coreml.weights import bits_of

SIMULATED_RELATIVE_L2 = 5e-2
"""How far a package may be from the simulation in float32: float16 between layers, which moves numbers near the middle
of two steps to the other one."""


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


def values_check(
    found: Compression, planned: Mapping[str, Rounded], build: Runner, simulation: Runner, sample: Inputs
) -> Check:
    """Whether values are rounded as samples say they should, and what that leaves of a sample's.

    Args:
        found: in the package.
        planned: of the float package.
        build: the float32 build.
        simulation: the same with what was found.
        sample: that is told about.
    """
    name = "rounded values"
    wanted, there = _by_reader(planned), _by_reader(found.values)
    if wrong := sorted(reader for reader in wanted.keys() | there.keys() if wanted.get(reader) != there.get(reader)):
        return Check(
            name, False, f"'{wrong[0]}' reads a value {_shown(there, wrong[0])}, not {_shown(wanted, wrong[0])}"
        )
    if not wanted:
        return Check(name, True, "none is: every layer reads what stays in floating point")
    outputs = {key: value for key, value in build.values(sample) if key in found.layers}
    exact = {key: value for key, value in sample.items() if key in found.values}  # the program's own inputs
    own, whole = {}, {}
    for key, value in simulation.values(sample):
        if key in found.values:
            exact[key] = value
        elif (source := key.removesuffix(DEQUANTIZED)) in exact:
            own[source] = sqnr([value], [exact.pop(source)])
        if key in outputs:
            whole[key] = sqnr([value], [outputs[key]])
    worst, last = min(own, key=lambda key: own[key]), min(whole, key=lambda key: whole[key])
    return Check(
        name,
        True,
        f"{len(own)} values in 8 bits of the ranges observed; least SQNR {own[worst]:.1f} dB in '{worst}', "
        f"of layers with all before them {whole[last]:.1f} dB in '{last}'",
    )


def _by_reader(values: Mapping[str, Rounded]) -> dict[str, tuple[float, int]]:
    """Scale and zero point of what an operation reads, by its name in the float32 build."""
    return {
        reader.removesuffix(HALF): (float(rounded.grid.scale), int(rounded.grid.zero_point))
        for rounded in values.values()
        for reader in rounded.readers
    }


def _shown(grids: Mapping[str, tuple[float, int]], reader: str) -> str:
    if reader not in grids:
        return "that is not rounded"
    scale, zero_point = grids[reader]
    return f"of scale {scale:.4g} and zero point {zero_point}"


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
