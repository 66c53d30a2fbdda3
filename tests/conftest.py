"""What several tests need: a small network with everything that makes exporters refuse, in a user's own file."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; read when torch is imported, after this

import torch

from mobilemix import cli


class TorchRandom:
    """torch's generator as Hypothesis seeds those it knows, before each example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # Hypothesis keeps no reference of its own
hypothesis.register_random(TORCH_RANDOM)

NETWORK = '''
import torch
from torch import nn


class SpectralNet(nn.Module):
    """Convolution, batch norm, a filter in the frequency domain, an exact GELU and a classifier."""

    def __init__(self, classes=4, channels=3, width=8, size=16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.stem = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.filter = nn.Parameter(torch.randn(width, size // 2, size // 4 + 1, 2, generator=generator))
        self.head = nn.Linear(width, classes)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
            self.norm.running_mean.copy_(torch.randn(width, generator=generator) * 0.1)
            self.norm.running_var.copy_(torch.rand(width, generator=generator) + 0.5)

    def forward(self, image):
        x = self.norm(self.stem(image))
        spectrum = torch.fft.rfft2(x, norm="ortho") * torch.view_as_complex(self.filter)
        x = x + torch.fft.irfft2(spectrum, s=x.shape[-2:], norm="ortho")
        return self.head(nn.functional.gelu(x).mean((2, 3)))


def make():
    return SpectralNet()
'''

SHAPE = "1x3x16x16"


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ranges that a version of the code observed, the user's own among them, answer for no other."""
    os.environ["MOBILEMIX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same weights and inputs in every run: a test that fails fails again."""
    torch.manual_seed(0)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Run the command line in this process; returns (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mobilemix", *map(str, arguments)])
        code = cli.run()
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    handlers = {stop: signal.getsignal(stop) for stop in (signal.SIGTERM, signal.SIGINT)}
    yield run
    for stop, handler in handlers.items():
        signal.signal(stop, handler)


@pytest.fixture
def network(tmp_path: Path) -> str:
    """`file.py:factory` of the network; it takes images of `SHAPE`."""
    path = tmp_path / "spectral_net.py"
    path.write_text(NETWORK)
    return f"{path}:make"
