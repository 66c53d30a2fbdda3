import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mobilemix.capture import capture
from mobilemix.passes import lower
from mobilemix.passes.base import arguments
from mobilemix.quantization import equalize as module
from mobilemix.quantization.equalize import LARGEST, SMALLEST, cross_layer, equalize, smooth
from mobilemix.quantization.scales import FIXED, Families
from mobilemix.signature import inputs_of
from mobilemix.targets.base import Inputs, Lowered

WIDTH, SIDE = 6, 8
UNLIKE = torch.tensor([0.05, 0.1, 0.5, 1.0, 3.0, 8.0])
LEAST_GAIN = 6.0
"""Decibels that equalisation has to bring where channels differ by factors of up to 160."""


class Network(nn.Module):
    """A pair, a depthwise triple and a residual stream, with channels of very unlike ranges."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.wide, self.depthwise, self.narrow = (
            nn.Conv2d(WIDTH, WIDTH, 1),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
            nn.Conv2d(WIDTH, WIDTH, 1),
        )
        self.head = nn.Linear(WIDTH, 4)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            for writer, reader in ((self.wide, self.depthwise), (self.stem, self.wide)):
                for parameter in writer.parameters():
                    parameter *= UNLIKE.reshape(-1, *[1] * (parameter.dim() - 1))
                columns = (-1, 1, 1, 1) if reader is self.depthwise else (1, -1, 1, 1)
                reader.weight /= UNLIKE.reshape(columns)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image).relu()
        x = x + self.narrow(self.depthwise(self.wide(x).relu()).relu())
        return self.head(x.relu().mean((2, 3)))


class Fixed(nn.Module):
    """Nothing between its layers passes factors on."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3), nn.Sigmoid())

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


def program_of(network: nn.Module, batch: int = 1) -> ExportedProgram:
    return lower(capture(network, (torch.zeros(batch, 3, SIDE, SIDE),)))


def lowered(network: nn.Module) -> Lowered:
    return Lowered("network", program_of(network), ("image",), ("logits",), None, None, None, {})


def samples(count: int = 4) -> list[Inputs]:
    generator = np.random.default_rng(0)
    return [{"image": generator.standard_normal((1, 3, SIDE, SIDE), dtype=np.float32)} for _ in range(count)]


def outputs(program: ExportedProgram, given: list[Inputs]) -> Tensor:
    with torch.no_grad():
        return torch.cat([program.module()(torch.from_numpy(sample["image"])) for sample in given])


class Rounded(torch.fx.Interpreter):
    """The program with all inputs of layers rounded to 8 bits of the tensor's range, and no weights."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__(program.module())
        readers = [layer.node for layer in Families(program).layers]
        self.rounded = {arguments(node)["input"].name for node in readers}

    def run_node(self, n: torch.fx.Node) -> object:
        result = super().run_node(n)
        if n.name in self.rounded:
            step = result.abs().max() / 127
            return (result / step).round() * step
        return result


def decibels(program: ExportedProgram, given: list[Inputs]) -> float:
    exact = outputs(program, given)
    with torch.no_grad():
        rounded = torch.cat([Rounded(program).run(torch.from_numpy(sample["image"])) for sample in given])
    return float(10 * torch.log10(exact.square().sum() / (exact - rounded).square().sum()))


@pytest.mark.parametrize("method", ["cross-layer", "smooth"])
def test_values_round_better_and_outputs_are_the_same_to_the_last_bit(method: str) -> None:
    before = lowered(Network())
    after, layers = equalize(before, method, samples())
    assert len(layers) == 5, "all of them have channels of unlike ranges"
    assert torch.equal(outputs(after.program, samples()), outputs(before.program, samples()))
    unseen = samples(12)[4:]
    assert decibels(after.program, unseen) > decibels(before.program, unseen) + LEAST_GAIN


def test_rows_and_columns_weigh_the_same_afterwards() -> None:
    program = program_of(Network())
    factors = cross_layer(program)
    families = Families(program)
    stem, wide, depthwise, narrow, head = families.layers

    def mean(*ranges: Tensor) -> Tensor:
        return torch.stack(list(ranges)).log2().mean(0)

    def ranges(given: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of writers and readers, by set of families."""
        (a, _), (b, c), (d, e), (f, _), (_, g) = (
            layer.ranges(given) for layer in (stem, wide, depthwise, narrow, head)
        )
        return [(mean(b), mean(e)), (mean(d), mean(narrow.ranges(given)[1])), (mean(a, f), mean(c, g))]

    one = torch.ones_like(factors)
    assert max(float((write - read).abs().max()) for write, read in ranges(one)) > 3
    for write, read in ranges(factors):
        # Powers of two are half a bit off each, and a depthwise layer has one on both sides.
        assert (write - read).abs().max() <= 2


def test_channels_have_like_peaks_afterwards() -> None:
    program = program_of(Network())

    def octaves(of: ExportedProgram) -> float:
        """Between the largest and the smallest peak of the channels that the depthwise layer, and no other, reads."""
        value = arguments(Families(of).layers[2].node)["input"].name
        peaks = module._peaks(of, {value: 1}, samples())[value]
        return float((peaks.max() / peaks.min()).log2())

    before = octaves(program)
    assert before > 7
    full, half = (Families(program).scaled(smooth(program, samples(), alpha)) for alpha in (1.0, 0.5))
    assert octaves(full) <= 1, "powers of two are half an octave off each"
    assert abs(octaves(half) - before / 2) <= 1


@pytest.mark.parametrize("method", ["cross-layer", "smooth"])
def test_factors_are_powers_of_two_within_bounds(method: str) -> None:
    network = Network()
    with torch.no_grad():
        network.wide.weight[0] = 0  # a channel that is always its bias, and one that is always zero
        network.wide.weight[1], network.wide.bias[1] = 0, 0
        network.depthwise.weight[2] *= 1e6
        network.depthwise.weight[3] *= 1e-6
    program = program_of(network)
    exponents = (cross_layer(program) if method == "cross-layer" else smooth(program, samples())).log2()
    assert torch.equal(exponents, exponents.round())
    assert exponents.min() >= SMALLEST
    assert exponents.max() <= LARGEST
    assert exponents[FIXED] == 0
    assert exponents.unique().numel() > 3


@pytest.mark.parametrize("method", ["cross-layer", "smooth"])
def test_both_programs_of_a_dynamic_batch_get_the_same_weights(method: str) -> None:
    network = Network()
    before = dataclasses.replace(
        lowered(network), program=program_of(network, 2), larger=program_of(network, 3), dynamic_batch=(1, 2, 4)
    )
    after, _ = equalize(before, method, samples())
    assert after.larger is not None
    assert inputs_of(after.larger)[0].shape[0] == 3
    assert after.program.state_dict.keys() == after.larger.state_dict.keys()
    for name, tensor in after.program.state_dict.items():
        assert torch.equal(tensor, after.larger.state_dict[name])


@pytest.mark.parametrize(("network", "method"), [(Network(), "none"), (Fixed(), "cross-layer"), (Fixed(), "smooth")])
def test_what_nothing_is_done_to_stays_the_very_same(network: nn.Module, method: str) -> None:
    before = lowered(network)
    after, layers = equalize(before, method, samples())
    assert after is before
    assert layers == ()
