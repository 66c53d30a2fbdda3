import coreml_lowered as case
import pytest
import torch
from torch import nn

from mobilemix import parity
from mobilemix.targets.coreml.convert import convert
from mobilemix.targets.coreml.package import read_package
from mobilemix.targets.coreml.target import BUILD_RELATIVE_L2, PackageRunner


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_both_forms_of_gelu_stay_what_they_are(tmp_path, approximate):
    class Net(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return nn.functional.gelu(image, approximate=approximate)

    lowered = case.lowered(Net(), output_names=("output",))
    convert(lowered, case.FP32, tmp_path / "net.mlpackage")
    samples = case.samples()
    outputs = [[PackageRunner(read_package(tmp_path / "net.mlpackage")).run(sample)["output"]] for sample in samples]
    expected = parity.reference(Net(), samples).outputs
    assert parity.compare(outputs, expected).relative_l2 < BUILD_RELATIVE_L2


@pytest.mark.parametrize(("count", "dim"), [(2, 1), (3, 2), (5, -1), (16, 3)])
def test_chunks_even_and_uneven(tmp_path, count, dim):
    class Net(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            first, *others = image.chunk(count, dim)
            return torch.cat([*others, first * 2], dim)

    lowered = case.lowered(Net(), output_names=("output",))
    convert(lowered, case.FP32, tmp_path / "net.mlpackage")
    (sample,) = case.samples()
    (expected,) = parity.reference(Net(), [sample]).outputs[0]
    runner = PackageRunner(read_package(tmp_path / "net.mlpackage"))
    assert parity.relative_l2(runner.run(sample)["output"], expected) < BUILD_RELATIVE_L2
