"""Scans at the extremes that trained models reach: steps up to 8, decay rates from 0.01 to 16, long sequences."""

import pytest
import torch
from passes_checks import relative_error
from torch import nn

from mobilemix import api, ops
from mobilemix.capture import capture
from mobilemix.parity import TIERS
from mobilemix.passes import lower

STATES = 4
SLOWEST, FASTEST, LONGEST_STEP = 0.01, 16.0, 8.0


def rates(channels):
    """From −0.01 to −16, evenly on a logarithmic scale."""
    return -torch.logspace(*torch.tensor([SLOWEST, FASTEST]).log10().tolist(), channels)


def steps(raw, sharpness):
    """Positive steps up to 8 from noise; most of them near both ends if sharp."""
    return LONGEST_STEP * torch.sigmoid(sharpness * raw)


class Selective(nn.Module):
    """Of noise (1, 24, L): as many steps near 1e-3 as near 8."""

    def __init__(self, channels=16, sharpness=4.0):
        super().__init__()
        self.sharpness = sharpness
        self.A = nn.Parameter(rates(channels * STATES).reshape(STATES, channels).T.contiguous())
        self.channels = channels

    def forward(self, x):
        u, raw, b, c = x.split([self.channels, self.channels, STATES, STATES], 1)
        return ops.selective_scan(u, steps(raw, self.sharpness), self.A, b, c)


class Ssd(nn.Module):
    """Of noise (1, 24, L), with heads of four channels."""

    def __init__(self, sharpness=4.0):
        super().__init__()
        self.A, self.sharpness = nn.Parameter(rates(8)), sharpness

    def forward(self, x):
        x = x.transpose(1, 2)
        u, raw, b, c = x.split([32, 8, STATES, STATES], 2)
        size = 1, -1, 1, STATES
        raw = steps(raw, self.sharpness)
        return ops.ssd_chunk_scan(u.reshape(1, -1, 8, 4), raw, self.A, b.reshape(size), c.reshape(size), 64)


class Recurrence(nn.Module):
    """h ← exp(A·step)·h + x, of noise (1, 32, L)."""

    def __init__(self):
        super().__init__()
        self.A = nn.Parameter(rates(16))

    def forward(self, x):
        x, raw = x[0].T.chunk(2, 1)
        return ops.linear_scan(torch.exp(self.A * steps(raw, 4.0)), x)


MODELS = {
    "selective": (Selective(), 40),
    "selective, many states": (Selective(400), 808),
    "selective, slow": (Selective(sharpness=0.1), 40),
    "ssd": (Ssd(), 48),
    "linear": (Recurrence(), 32),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [300, pytest.param(16384, marks=pytest.mark.slow)])
def test_plain_operators_are_exact(name, length):
    module, channels = MODELS[name]
    x = torch.randn(1, channels, length, generator=torch.Generator().manual_seed(0))
    assert relative_error(lower(capture(module, (x,))), module, x) <= TIERS["fp32"].relative_l2


FAST = {("selective", "onnx", "fp16", 300), ("ssd", "coreml", "fp16", 300)}
CASES = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow, id=" ".join(map(str, case)))
    for name in MODELS
    for target in ("onnx", "coreml")
    for precision in ("fp32", "fp16")
    for length in (300, 16384)
    # Core ML's executor would hold every value of 16384 × 1600 states.
    if (case := (name, target, precision, length)) and not (name.endswith("states") and length > 300)
]


@pytest.mark.parametrize(("name", "target", "precision", "length"), CASES)
def test_artifacts_are_in_their_tier(name, target, precision, length, tmp_path):
    module, channels = MODELS[name]
    export = api.export(
        module, output=tmp_path, target=target, precision=precision, input_shapes=((1, channels, length),)
    )
    assert [check for check in export.parity.checks if check.passed is False] == []
    assert export.parity.passed, export.parity.agreement
