"""Small blocks of every family that scans: mobilemix's operators and lowerings against the papers' recurrences."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import zoo_loops
from passes_checks import TOLERANCE, operators, relative_error, widened
from torch import nn

from mobilemix.capture import capture
from mobilemix.passes import lower
from mobilemix.shims import shim

EXACT = 1e-13
"""Relative error of two orders of summation in float64."""

BLOCKS: dict[str, tuple[Callable[[ModuleType], nn.Module], tuple[int, ...]]] = {
    "vision_mamba": (lambda scans: scans.VisionMambaBlock(8), (2, 11, 8)),
    "vmamba": (lambda scans: scans.VMambaBlock(8), (2, 3, 5, 8)),
    "mambavision": (lambda scans: scans.MambaVisionMixer(8), (2, 9, 8)),
    "mambair": (lambda scans: scans.MambaIRBlock(30, 4, 3), (1, 12, 30)),
    "vssd": (lambda scans: scans.VSSDBlock(16, causal=False, head=8, states=4), (2, 3, 5, 16)),
    "vssd_causal": (lambda scans: scans.VSSDBlock(16, causal=True, head=8, states=4, chunk=4), (2, 3, 5, 16)),
}


@pytest.fixture(scope="module")
def on_operators() -> ModuleType:
    with shim("mamba"):
        import zoo_scans
    return zoo_scans


@pytest.fixture(scope="module")
def on_loops() -> ModuleType:
    return zoo_loops.load()


def seeded(name: str, scans: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    return BLOCKS[name][0](scans).eval()


@pytest.mark.parametrize("name", BLOCKS)
def test_operators_compute_the_recurrences(name: str, on_operators: ModuleType, on_loops: ModuleType) -> None:
    x = torch.randn(BLOCKS[name][1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = (widened(seeded(name, scans))(x) for scans in (on_operators, on_loops))
    assert (found - expected).norm() / expected.norm() < EXACT


@pytest.mark.parametrize("name", BLOCKS)
def test_no_scan_is_left_after_all_passes(name: str, on_operators: ModuleType) -> None:
    module = seeded(name, on_operators)
    x = torch.randn(BLOCKS[name][1], generator=torch.Generator().manual_seed(0))
    captured = capture(module, (x,))
    program = lower(captured)
    assert name == "vssd" or any("scan" in operator for operator in operators(captured))
    assert not [operator for operator in operators(program) if "scan" in operator]
    assert relative_error(program, module, x) < TOLERANCE
