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


@pytest.mark.parametrize("groups", [1, 3, 6])
@pytest.mark.parametrize("affine", [True, False])
def test_group_norm_is_one_operation_that_stays_within_fp16(tmp_path, groups, affine):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)
            self.norm = nn.GroupNorm(groups, 6, eps=1e-3, affine=affine)
            with torch.no_grad():
                for index, parameter in enumerate(self.norm.parameters()):
                    parameter.copy_(torch.linspace(-1, 2, 6) + index)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.norm(self.stem(image) * 2000)

    torch.manual_seed(0)
    module = Net().eval()
    lowered = case.lowered(module, output_names=("output",))
    (sample,) = case.samples()
    (expected,) = parity.reference(module, [sample]).outputs[0]
    for recipe, limit in ((case.FP32, BUILD_RELATIVE_L2), (case.FP16, parity.TIERS["fp16"].relative_l2)):
        path = tmp_path / f"{recipe.precision}.mlpackage"
        convert(lowered, recipe, path)
        assert parity.relative_l2(PackageRunner(read_package(path)).run(sample)["output"], expected) < limit
        types = [each.type for each in read_package(path).operations]
        assert types.count("layer_norm") == 1
        assert "square" not in types


@pytest.mark.parametrize("dim", [-3, -2, -1, 0, 2])
@pytest.mark.parametrize(("of", "dtype"), [("values", None), ("signs", None), ("signs", torch.float32)])
def test_cumulative_sums_along_any_axis(tmp_path, dim, of, dtype):
    class Net(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cumsum(image > 0 if of == "signs" else image, dim, dtype=dtype).to(image.dtype)

    lowered = case.lowered(Net(), output_names=("output",))
    convert(lowered, case.FP32, tmp_path / "net.mlpackage")
    (sample,) = case.samples()
    (expected,) = parity.reference(Net(), [sample]).outputs[0]
    runner = PackageRunner(read_package(tmp_path / "net.mlpackage"))
    assert parity.relative_l2(runner.run(sample)["output"], expected) < BUILD_RELATIVE_L2


@pytest.mark.parametrize(("dim", "keepdim"), [(1, True), (-1, False)])
def test_products_along_an_axis(tmp_path, dim, keepdim):
    class Net(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.prod(dim, keepdim=keepdim)

    lowered = case.lowered(Net(), output_names=("output",))
    convert(lowered, case.FP32, tmp_path / "net.mlpackage")
    (sample,) = case.samples()
    (expected,) = parity.reference(Net(), [sample]).outputs[0]
    found = PackageRunner(read_package(tmp_path / "net.mlpackage")).run(sample)["output"]
    assert found.shape == expected.shape
    assert parity.relative_l2(found, expected) < BUILD_RELATIVE_L2
