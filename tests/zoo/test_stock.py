"""What docs/zoo.md says of the stock exporters, so that it is corrected when they change."""

from pathlib import Path

import coremltools as ct
import pytest
import torch
import zoo_fourier
import zoo_loops
from torch import Tensor, nn

import mobilemix
from mobilemix.targets import find_target

pytestmark = pytest.mark.slow

SHORT, LONG = 24, 48


def gfnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return zoo_fourier.GFNet(channels=32, depth=1, side=64).eval(), torch.randn(1, 3, 64, 64)


def mambavision(length: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return zoo_loops.load().MambaVisionMixer(16).eval(), torch.randn(1, length, 16)


def stock_onnx(module: nn.Module, x: Tensor, folder: Path) -> dict[str, int]:
    path = folder / "stock.onnx"
    torch.onnx.export(module, (x,), path, dynamo=True, verbose=False)
    return find_target("onnx").op_histogram(path)


def our_onnx(module: nn.Module, x: Tensor, folder: Path) -> dict[str, int]:
    done = mobilemix.export(module, target="onnx", output=folder, input_shapes=(tuple(x.shape),))
    assert done.parity.passed
    return done.manifest.artifact["operators"]


def stock_coreml(module: nn.Module, x: Tensor) -> object:
    program = torch.export.export(module, (x,), strict=False).run_decompositions({})
    return ct.convert(program, minimum_deployment_target=ct.target.iOS16, skip_model_load=True)


def test_coremltools_has_no_two_dimensional_transform() -> None:
    module, x = gfnet()
    with pytest.raises(NotImplementedError, match="fft_rfft2"):
        stock_coreml(module, x)
    with pytest.raises(NotImplementedError, match="fft_rfft2"):
        ct.convert(torch.jit.trace(module, x), inputs=[ct.TensorType(shape=x.shape)], skip_model_load=True)


def test_torch_onnx_writes_dft_nodes(tmp_path: Path) -> None:
    module, x = gfnet()
    assert stock_onnx(module, x, tmp_path)["DFT"] >= 2
    assert "DFT" not in our_onnx(module, x, tmp_path)


def test_torch_onnx_unrolls_loops(tmp_path: Path) -> None:
    """Step after step, where ours grow with the square root of the length."""
    stock, ours = (
        [sum(export(*mambavision(length), tmp_path).values()) for length in (SHORT, LONG)]
        for export in (stock_onnx, our_onnx)
    )
    assert stock[1] - stock[0] >= 5 * (LONG - SHORT)
    assert ours[1] - ours[0] <= LONG - SHORT
