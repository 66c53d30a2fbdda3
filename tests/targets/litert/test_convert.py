"""What models take, give and ask for."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemix import api
from mobilemix.errors import InputError, UnsupportedOpError
from mobilemix.recipe import Recipe

pytest.importorskip("litert_torch", reason="needs pip install 'mobilemix[litert]'")

from mobilemix.targets.litert.runtime import LiteRTRunner


class Mixed(nn.Module):
    """Of tokens, a mask and a spectrum, with two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)

    def forward(self, tokens: Tensor, mask: Tensor, spectrum: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.where(mask.unsqueeze(-1), self.table(tokens), -1.0)
        return chosen + torch.fft.irfft(spectrum, n=6), tokens + 1


def test_integers_booleans_and_complex_numbers(tmp_path: Path) -> None:
    recipe = Recipe(
        model="mixed",
        target="litert",
        input_shapes=((1, 4), (1, 4), (1, 4, 4)),
        input_dtypes=("int64", "bool", "complex64"),
    )
    result = api.deploy(api.prepare(recipe, module=Mixed()), recipe, tmp_path)
    assert result.parity.passed, result.parity
    inputs, outputs = result.manifest.provenance["inputs"], result.manifest.provenance["outputs"]
    assert (inputs["tokens"]["dtype"], inputs["tokens"]["source"]) == ("int32", "int64")
    assert inputs["mask"]["dtype"] == "bool"
    assert inputs["spectrum"]["shape"] == (1, 4, 4, 2)
    assert outputs["output_1"] == {"shape": (1, 4), "dtype": "int32", "source": "int64"}
    stored = LiteRTRunner.from_file(result.path)._run.get_input_details()
    assert {name: np.dtype(each["dtype"]).name for name, each in stored.items()} == {
        "tokens": "int32",
        "mask": "bool",
        "spectrum": "float32",
    }


class Unsupported(nn.Module):
    """Asks for an operator that LiteRT has none for."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(F.relu(x))


def test_an_operator_that_litert_lacks_is_named_with_its_line(tmp_path: Path) -> None:
    recipe = Recipe(model="unsupported", target="litert", input_shapes=((1, 4),))
    with pytest.raises(UnsupportedOpError, match=r"i0.*test_convert\.py:\d+ \(return torch\.special\.i0"):
        api.deploy(api.prepare(recipe, module=Unsupported()), recipe, tmp_path)
    assert not list(tmp_path.iterdir())


def test_int8_needs_an_image_to_calibrate_on(tmp_path: Path) -> None:
    recipe = Recipe(model="tokens", target="litert", precision="int8", input_shapes=((1, 4),))
    with pytest.raises(InputError, match="calibrated on photographs.*--precision fp16"):
        api.deploy(api.prepare(recipe, module=nn.Linear(4, 4)), recipe, tmp_path)
