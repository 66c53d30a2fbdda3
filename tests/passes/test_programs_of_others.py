"""Programs that users export themselves, whole or decomposed, lower like the ones that mobilemix captures."""

from collections.abc import Callable

import pytest
import torch
from passes_checks import TOLERANCE, assert_real, operators, relative_error
from torch import Tensor, nn
from torch.export import ExportedProgram
from zoo_fourier import AFNO, FNet, LongConvolution, SpectralConvolution

from mobilemix.passes import lower


class Filtered(nn.Module):
    """Convolutions with batch norms, a global filter between them, an assignment, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.SiLU())
        self.filter = nn.Parameter(torch.randn(6, 7, 4, dtype=torch.complex64))
        self.up = nn.Sequential(nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 5)
        for norm in (self.stem[1], self.up[1]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        x = x + torch.fft.irfft2(torch.fft.rfft2(x, norm="ortho") * self.filter, s=x.shape[-2:], norm="ortho")
        y = self.up(x)
        y[:, :2] = nn.functional.softshrink(y[:, :2], 0.1)
        return self.head(y.mean((2, 3)))


MODULES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "global filter": (Filtered(), (1, 3, 14, 14)),
    "AFNO": (AFNO(8, 2, 0.5), (2, 8, 10, 8)),
    "FNet": (FNet(), (2, 12, 10)),
    "FNO": (SpectralConvolution(4, 3), (2, 4, 9, 10)),
    "long convolution": (LongConvolution(3, 20), (2, 3, 20)),
}
FORMS: dict[str, Callable[..., ExportedProgram]] = {
    "as exported": lambda module, *inputs: torch.export.export(module, inputs),
    "strict": lambda module, *inputs: torch.export.export(module, inputs, strict=True),
    "functional": lambda module, *inputs: torch.export.export(module, inputs).run_decompositions({}),
    "decomposed": lambda module, *inputs: torch.export.export(module, inputs).run_decompositions(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODULES)
def test_every_form(name: str, form: str) -> None:
    module, shape = MODULES[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = lower(FORMS[form](module.eval(), x))
    assert_real(program)
    assert relative_error(program, module, x) < TOLERANCE
    assert lower(program) is program, "nothing is left to lower"


@pytest.mark.parametrize("form", FORMS)
def test_batch_norms_are_folded(form: str) -> None:
    module, shape = MODULES["global filter"]
    program = lower(FORMS[form](module.eval(), torch.zeros(shape)))
    assert not [name for name in operators(program) if "batch_norm" in name]
    decomposed = {"convolution": 2}
    whole = {"conv2d": 1, "conv_transpose2d": 1}
    convolutions = {name: count for name, count in operators(program).items() if name.startswith("conv")}
    assert convolutions == (decomposed if form == "decomposed" else whole)


@pytest.mark.parametrize("form", FORMS)
def test_names_and_structure_are_the_users(form: str) -> None:
    class Two(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            return {"energy": torch.fft.rfft(left).abs(), "sum": left + right}

    inputs = torch.randn(2, 8), torch.randn(2, 8)
    lowered = lower(FORMS[form](Two(), *inputs))
    assert lowered.graph_signature.user_inputs == ("left", "right")
    found, expected = lowered.module()(*inputs), Two()(*inputs)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)
