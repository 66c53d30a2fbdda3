"""The zoo: small models of every family that mixes by Fourier transforms or state-space scans, with seeded weights.

From a package where one exists, else from our own blocks (`zoo_fourier.py`, `zoo_scans.py`). Each factory takes no
arguments, so that the command line can name it: `mobilemix export tests/zoo_models.py:gfnet --input 1x3x224x224`.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from unittest import mock

import torch
import zoo_fourier
import zoo_loops
from torch import Tensor, nn

from mobilemix import Recipe
from mobilemix.shims import shim

VOCABULARY = 1000


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        build: makes it.
        shapes: of its inputs.
        title: what it is, in the words of its authors.
        origin: the package that it comes from, or the paper that it was written from.
        package: what `build` imports beside torch; None for our own blocks.
        dtypes: of its inputs; empty is float32.
        scans: whether it imports packages that need CUDA, in whose place `mobilemix.shims` stands.
    """

    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    title: str
    origin: str
    package: str | None = None
    dtypes: tuple[str, ...] = ()
    scans: bool = False


def build(name: str, *, loops: bool = False) -> nn.Module:
    """The model in evaluation mode, with the same weights every time; its scans are mobilemix's, or plain loops."""
    entry = ZOO[name]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=()))
        if entry.scans and loops:
            stack.enter_context(mock.patch.dict(sys.modules, zoo_scans=zoo_loops.load()))
        elif entry.scans:
            stack.enter_context(shim("mamba"))
        torch.manual_seed(0)
        return entry.build().eval()


def sample(name: str) -> tuple[Tensor, ...]:
    """Inputs: standard normal values, or tokens."""
    entry, generator = ZOO[name], torch.Generator().manual_seed(0)
    if entry.dtypes == ("int64",):
        return tuple(torch.randint(VOCABULARY, shape, generator=generator) for shape in entry.shapes)
    return tuple(torch.randn(shape, generator=generator) for shape in entry.shapes)


def recipe(name: str, **options: object) -> Recipe:
    """What `mobilemix export` is told of the model."""
    entry = ZOO[name]
    return Recipe(model=name, input_shapes=entry.shapes, input_dtypes=entry.dtypes, **options)


class States(nn.Module):
    """A model of transformers that takes embeddings or tokens and returns its last hidden states alone."""

    def __init__(self, model: nn.Module, argument: str, **options: object):
        super().__init__()
        self.model, self.argument, self.options = model, argument, options

    def forward(self, x: Tensor) -> Tensor:
        return self.model(**{self.argument: x}, **self.options).last_hidden_state


def gfnet() -> nn.Module:
    """GFNet-Ti's width and map, two blocks deep."""
    return zoo_fourier.GFNet(channels=256, depth=2)


def afno() -> nn.Module:
    """Two blocks at GFNet-Ti's width and map, half of the frequencies kept."""
    return nn.Sequential(*(zoo_fourier.AFNOBlock(256, blocks=8, kept=0.5) for _ in range(2)))


def lama() -> nn.Module:
    """Two residual blocks."""
    return nn.Sequential(*(zoo_fourier.LaMaBlock(128) for _ in range(2)))


def hyena() -> nn.Module:
    """One operator of order 2."""
    return zoo_fourier.Hyena(channels=128, length=1024)


def fnet() -> nn.Module:
    """Two layers, from tokens."""
    return _fnet("input_ids")


def fnet_matrices() -> nn.Module:
    """Two layers with the transforms as complex matrices, as FNet does on TPUs."""
    return _fnet("inputs_embeds", use_tpu_fourier_optimizations=True, tpu_short_seq_length=128)


def fno() -> nn.Module:
    """Two Fourier layers on a plane."""
    from neuralop.models import FNO

    return FNO(n_modes=(16, 16), hidden_channels=32, in_channels=1, out_channels=1, n_layers=2)


def tfno() -> nn.Module:
    """Two Fourier layers on a plane, their weights Tucker-factorised and never multiplied out."""
    from neuralop.models import TFNO

    return TFNO(
        n_modes=(16, 16),
        hidden_channels=32,
        in_channels=1,
        out_channels=1,
        n_layers=2,
        factorization="tucker",
        implementation="factorized",
        rank=0.1,
    )


def mamba() -> nn.Module:
    """Two layers; the scan is a Python loop."""
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2)
    return States(MambaModel(config), "inputs_embeds", use_cache=False)


def mamba2() -> nn.Module:
    """Two layers; the scan works on chunks of 64, the last one padded."""
    from transformers import Mamba2Config, Mamba2Model

    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=2, num_heads=8, head_dim=32, n_groups=1, chunk_size=64
    )
    return States(Mamba2Model(config), "inputs_embeds", use_cache=False)


def mambapy() -> nn.Module:
    """Two layers; the scan is a tree of assignments in place."""
    return _mambapy(pscan=True)


def mambapy_loop() -> nn.Module:
    """Two layers; the scan is a Python loop."""
    return _mambapy(pscan=False)


def vision_mamba() -> nn.Module:
    """Two bidirectional blocks at Vim-Ti's width."""
    import zoo_scans

    return nn.Sequential(*(zoo_scans.VisionMambaBlock(192) for _ in range(2)))


def vmamba() -> nn.Module:
    """Two blocks on a 14 × 14 map."""
    import zoo_scans

    return nn.Sequential(*(zoo_scans.VMambaBlock(192) for _ in range(2)))


def mambavision() -> nn.Module:
    """Two mixers at the third stage's width and window of MambaVision-T."""
    import zoo_scans

    return nn.Sequential(*(zoo_scans.MambaVisionMixer(320) for _ in range(2)))


def mambair() -> nn.Module:
    """One block at the width of the light network, on a 32 × 32 map."""
    import zoo_scans

    return zoo_scans.MambaIRBlock(60, 32, 32)


def vssd() -> nn.Module:
    """Two blocks without causality on a 14 × 14 map."""
    import zoo_scans

    return nn.Sequential(*(zoo_scans.VSSDBlock(192, causal=False) for _ in range(2)))


def vssd_causal() -> nn.Module:
    """Two blocks with the scan in two directions on a 14 × 14 map."""
    import zoo_scans

    return nn.Sequential(*(zoo_scans.VSSDBlock(192, causal=True) for _ in range(2)))


def _fnet(argument: str, **options: object) -> nn.Module:
    from transformers import FNetConfig, FNetModel

    config = FNetConfig(vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1024, num_hidden_layers=2, **options)
    return States(FNetModel(config), argument)


def _mambapy(*, pscan: bool) -> nn.Module:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=128, n_layers=2, pscan=pscan))


IMAGE, TOKENS, PLANE, MAP = (1, 3, 224, 224), (1, 196, 128), (1, 1, 64, 64), (1, 14, 14, 192)

ZOO = {
    "gfnet": Entry(gfnet, (IMAGE,), "GFNet", "arXiv:2107.00645"),
    "afno": Entry(afno, ((1, 14, 14, 256),), "AFNO", "arXiv:2111.13587"),
    "fnet": Entry(fnet, ((1, 128),), "FNet", "transformers", "transformers", ("int64",)),
    "fnet_matrices": Entry(fnet_matrices, ((1, 128, 256),), "FNet, matrices", "transformers", "transformers"),
    "fno": Entry(fno, (PLANE,), "FNO", "neuraloperator", "neuralop"),
    "tfno": Entry(tfno, (PLANE,), "TFNO", "neuraloperator", "neuralop"),
    "lama": Entry(lama, ((1, 128, 32, 32),), "LaMa blocks", "arXiv:2109.07161"),
    "hyena": Entry(hyena, ((1, 1024, 128),), "Hyena", "arXiv:2302.10866"),
    "mamba": Entry(mamba, (TOKENS,), "Mamba", "transformers", "transformers"),
    "mamba2": Entry(mamba2, (TOKENS,), "Mamba-2", "transformers", "transformers"),
    "mambapy": Entry(mambapy, (TOKENS,), "Mamba, parallel scan", "mambapy", "mambapy"),
    "mambapy_loop": Entry(mambapy_loop, (TOKENS,), "Mamba, loop", "mambapy", "mambapy"),
    "vision_mamba": Entry(vision_mamba, ((1, 197, 192),), "Vision Mamba", "arXiv:2401.09417", scans=True),
    "vmamba": Entry(vmamba, (MAP,), "VMamba SS2D", "arXiv:2401.10166", scans=True),
    "mambavision": Entry(mambavision, ((1, 196, 320),), "MambaVision mixer", "arXiv:2407.08083", scans=True),
    "mambair": Entry(mambair, ((1, 1024, 60),), "MambaIR block", "arXiv:2402.15648", scans=True),
    "vssd": Entry(vssd, (MAP,), "VSSD", "arXiv:2407.18559", scans=True),
    "vssd_causal": Entry(vssd_causal, (MAP,), "VSSD, causal", "arXiv:2407.18559", scans=True),
}
