"""An open batch from end to end: what is captured, tried, stated and refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import SHAPE
from test_backbones import checkpoint
from torch import Tensor, nn

import mobilemix
from mobilemix import api, batches, ops
from mobilemix.errors import BatchError, InputError, MobilemixError
from mobilemix.manifest import read_manifest
from mobilemix.recipe import Recipe, load_recipe
from mobilemix.targets.onnx import scans
from mobilemix.targets.onnx.runtime import OnnxRunner

BATCH = (1, 4, 9)
SHAPES = ((1, 3, 16, 16),)
TOKENS = ((1, 5, 8),)


class Function(nn.Module):
    """One function beside a linear map of 8 features."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.linear = function, nn.Linear(8, 8)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


@pytest.mark.parametrize(
    ("stated", "tried"),
    [
        ((1, 8, 64), (1, 5, 8, 64)),
        ((1, 1, 1), (1,)),
        ((1, 2, 3), (1, 2, 3)),
        ((4, 4, 6), (4, 5, 6)),
        ((5, 7, 9), (5, 7, 9)),
    ],
)
def test_the_sizes_that_are_tried(stated: tuple[int, int, int], tried: tuple[int, ...]) -> None:
    assert batches.sizes_to_try(*stated) == tried


def test_the_batch_is_the_first_axis_of_the_size_of_the_first_inputs() -> None:
    assert batches.resized(((1, 3, 8), (1,), (5, 5), (2, 1)), 4) == ((4, 3, 8), (4,), (5, 5), (2, 1))
    assert batches.resized(((6, 3), (6, 6), (1, 3)), 2) == ((2, 3), (2, 6), (1, 3))


def test_an_export_for_every_batch(network: str, tmp_path: Path) -> None:
    result = mobilemix.export(network, target="onnx", input_shapes=SHAPES, dynamic_batch=BATCH, output=tmp_path)
    assert result.parity.passed
    assert {name: one.samples for name, one in result.parity.agreement.items()} == {
        f"{kind} × {size}": size for kind in ("noise", "photographs") for size in (1, 4, 5, 9)
    }
    provenance = read_manifest(result.path).provenance
    assert provenance["inputs"]["image"]["shape"] == ["batch", 3, 16, 16]
    assert provenance["outputs"]["logits"]["shape"] == ["batch", 4]
    assert provenance["batch"] == {"min": 1, "opt": 4, "max": 9}
    inside = {entry.key: entry.value for entry in onnx.load(result.path).metadata_props}
    assert json.loads(inside["dynamic_batch"]) == list(BATCH)
    assert json.loads(inside["mobilemix.provenance"])["batch"] == provenance["batch"]


def test_each_batch_is_answered_as_by_its_own_export_and_by_the_source(network: str, tmp_path: Path) -> None:
    whole = mobilemix.export(network, target="onnx", input_shapes=SHAPES, dynamic_batch=BATCH, output=tmp_path)
    source = api.prepare(Recipe(model=network, target="onnx", input_shapes=SHAPES)).source.module.double()
    for size in (1, 4, 9):
        images = torch.randn(size, 3, 16, 16)
        (answer,) = OnnxRunner(whole.path).run({"image": images.numpy()}).values()
        one = mobilemix.export(network, target="onnx", input_shapes=((size, 3, 16, 16),), output=tmp_path / str(size))
        (fixed,) = OnnxRunner(one.path).run({"image": images.numpy()}).values()
        np.testing.assert_allclose(answer, fixed, rtol=1e-4, atol=1e-6)
        with torch.no_grad():
            np.testing.assert_allclose(answer, source(images.double()).numpy(), rtol=1e-4, atol=1e-6)


def test_the_same_inputs_give_the_same_bytes(network: str, tmp_path: Path) -> None:
    options = {"target": "onnx", "input_shapes": SHAPES, "dynamic_batch": BATCH}
    one, two = (mobilemix.export(network, **options, output=tmp_path / name).path for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_verify_tries_every_size_again(network: str, tmp_path: Path) -> None:
    path = mobilemix.export(network, target="onnx", input_shapes=SHAPES, dynamic_batch=BATCH, output=tmp_path).path
    parity = mobilemix.verify(path)
    assert parity.passed
    assert sum(one.samples for one in parity.agreement.values()) == 2 * (1 + 4 + 5 + 9)
    model = onnx.load(path)
    fixed = next(value for value in model.graph.initializer if -1 in onnx.numpy_helper.to_array(value).ravel())
    sizes = onnx.numpy_helper.to_array(fixed).copy()
    # A file that is right for one size alone.
    sizes[sizes == -1] = 1
    fixed.CopyFrom(onnx.numpy_helper.from_array(sizes, fixed.name))
    onnx.save(model, path)
    with pytest.raises(MobilemixError):
        mobilemix.verify(path)


def test_the_other_inputs_of_a_model(tmp_path: Path) -> None:
    module = Function(lambda m, x, y, mask: m.linear(x) * y[:, None] + (x @ x.mT * mask).sum(-1, keepdim=True))
    shapes = ((1, 5, 8), (1, 8), (5, 5))
    result = mobilemix.export(module, target="onnx", input_shapes=shapes, dynamic_batch=BATCH, output=tmp_path)
    assert result.parity.passed
    assert [each["shape"][0] for each in result.manifest.provenance["inputs"].values()] == ["batch", "batch", 5]


def test_tokens_and_complex_numbers(tmp_path: Path) -> None:
    class Spectra(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(11, 8)

        def forward(self, tokens: Tensor, spectrum: Tensor) -> tuple[Tensor, Tensor]:
            waves = torch.fft.ifft(spectrum * 2).real
            return self.embedding(tokens) + waves[:, None], spectrum.conj()

    torch.manual_seed(0)
    shapes, dtypes = ((1, 6), (1, 8)), ("int64", "complex64")
    result = mobilemix.export(
        Spectra(), target="onnx", input_shapes=shapes, input_dtypes=dtypes, dynamic_batch=BATCH, output=tmp_path
    )
    assert result.parity.passed
    assert result.manifest.provenance["inputs"]["spectrum"]["shape"] == ("batch", 8, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["affnet_t", "casvit_xs", "efficientvim_m1", "dualtoken_vit_tiny"])
def test_a_backbone_of_each_family(name: str, tmp_path: Path) -> None:
    weights = checkpoint(name, tmp_path)
    prepared = api.prepare(Recipe(model=name, weights=weights, target="onnx", dynamic_batch=BATCH))
    for target, precision in (("onnx", "fp32"), ("onnx", "fp16"), ("tensorrt", "fp32")):
        recipe = Recipe(model=name, weights=weights, target=target, precision=precision, dynamic_batch=BATCH)
        result = api.deploy(prepared, recipe, tmp_path / target / precision)
        assert result.parity.passed, result.parity
        assert all(agreement.top1 == 1 for agreement in result.parity.agreement.values())


def test_float16(network: str, tmp_path: Path) -> None:
    options = {"target": "onnx", "precision": "fp16", "input_shapes": SHAPES, "dynamic_batch": BATCH}
    result = mobilemix.export(network, **options, output=tmp_path)
    assert result.parity.passed
    assert "fp16 file is the twin, rounded" in {check.name for check in result.parity.checks}


REFUSED = {
    "a mean over the batch": (lambda m, x: x - x.mean(0, keepdim=True), "output 0 is another for the same sample"),
    "samples in reverse": (lambda m, x: x + x.flip(0), "output 0 is another for the same sample"),
    "a running sum": (lambda m, x: x.cumsum(0), "output 0 is another for the same sample"),
    "the number of samples": (lambda m, x: x / len(x), "output 0 is another for the same sample"),
    "something else for few": (lambda m, x: x if len(x) > 2 else x.relu(), "output 0 is another for the same sample"),
    "an axis that a batch of 1 loses": (
        lambda m, x: m.linear(x).mean(1, keepdim=True).squeeze(),
        "output 0 has the shape (8,) instead of (1, 8) for a batch of 1",
    ),
    "one batch written down": (lambda m, x: m.linear(x.view(5, 8))[None], "the model cannot take a batch of 2: torch."),
    "samples side by side": (lambda m, x: x.reshape(1, -1, 8), "output 0 has the shape (1, 10, 8) for a batch of 2"),
    "time first": (lambda m, x: x.transpose(0, 1), "output 0 has the shape (5, 2, 8) for a batch of 2"),
    "an output without samples": (lambda m, x: (x, m.linear.weight * 2), "output 1 has the shape (8, 8)"),
    "a loop over samples": (
        lambda m, x: torch.stack([m.linear(one) for one in x]),
        "differs from that for 8 by more than the size",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_leave_their_batch_open(name: str, tmp_path: Path) -> None:
    function, message = REFUSED[name]
    with pytest.raises(BatchError) as caught:
        mobilemix.export(Function(function), target="onnx", input_shapes=TOKENS, dynamic_batch=BATCH, output=tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_input_without_a_batch(tmp_path: Path) -> None:
    module = Function(lambda m, image: nn.functional.conv2d(image[None], torch.ones(4, 3, 3, 3)))
    with pytest.raises(BatchError, match="cannot take a batch of 2: .*3 channels"):
        mobilemix.export(module, target="onnx", input_shapes=((3, 6, 6),), dynamic_batch=BATCH, output=tmp_path)


def test_forms_that_are_chosen_by_size_are_chosen_for_larger_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channels, states = 12, 4
    monkeypatch.setattr(scans, "LEAST_STATES", 3 * channels * states)  # a Scan for 3 samples, plain operators for 2

    class Selective(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.A = nn.Parameter(-torch.rand(channels, states))

        def forward(self, u: Tensor, b: Tensor) -> Tensor:
            return ops.selective_scan(u, u.abs(), self.A, b, b)

    shapes = ((1, channels, 40), (1, states, 40))
    result = mobilemix.export(Selective(), target="onnx", input_shapes=shapes, dynamic_batch=BATCH, output=tmp_path)
    assert result.parity.passed
    assert result.manifest.artifact["operators"]["Scan"] == 1


def test_a_recipe_has_it(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('target = "onnx"\ndynamic_batch = [1, 8, 64]\n')
    assert load_recipe(path).dynamic_batch == (1, 8, 64)
    for sizes in ("[0, 1, 2]", "[2, 1, 3]", "[1, 3, 2]", "[1, 2]", "[1.0, 2, 3]", "8"):
        path.write_text(f'target = "onnx"\ndynamic_batch = {sizes}\n')
        with pytest.raises(InputError, match="dynamic_batch"):
            load_recipe(path)


def test_a_model_is_deployed_as_it_was_prepared(network: str, tmp_path: Path) -> None:
    recipe = Recipe(model=network, target="onnx", input_shapes=SHAPES)
    with pytest.raises(InputError, match="prepared for another dynamic_batch"):
        api.deploy(api.prepare(recipe), dataclasses.replace(recipe, dynamic_batch=BATCH), tmp_path)


def test_the_command_line(command: Callable[..., tuple[int, str, str]], network: str, tmp_path: Path) -> None:
    options = ("--input", SHAPE, "-o", tmp_path, "--dynamic-batch", "1,4,9")
    code, out, _ = command("export", network, "-t", "onnx", *options)
    assert code == 0
    assert "photographs × 9" in out
    assert "top-1 38/38" in out
    code, out, _ = command("verify", tmp_path / "make.onnx")
    assert code == 0
    assert "noise × 5" in out


def test_targets_without_it_beside_one_that_has_it(
    command: Callable[..., tuple[int, str, str]], network: str, tmp_path: Path
) -> None:
    options = ("--input", SHAPE, "-o", tmp_path, "--dynamic-batch", "1,4,9", "--json")
    code, out, _ = command("export", network, "-t", "coreml,onnx", *options)
    assert code == 0
    fixed, free = (each["manifest"] for each in json.loads(out))
    assert fixed["provenance"]["inputs"]["image"]["shape"] == [1, 3, 16, 16]
    assert free["provenance"]["inputs"]["image"]["shape"] == ["batch", 3, 16, 16]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-t", "coreml", "--dynamic-batch", "1,4,9"), "the target coreml has no dynamic_batch; only onnx"),
        (("-t", "onnx", "--dynamic-batch", "1,8"), "is not min,opt,max with 1 <= min <= opt <= max, such as 1,8,64"),
        (("-t", "onnx", "--dynamic-batch", "4,1,8"), "dynamic_batch 4,1,8 is not min,opt,max"),
        (("-t", "onnx", "--dynamic-batch", "0,1,8"), "dynamic_batch 0,1,8 is not min,opt,max"),
        (("-t", "onnx", "--dynamic-batch", "1,x,8"), "'1,x,8' is not a comma list of whole numbers, such as 1,8,64"),
    ],
)
def test_what_no_export_can_have_is_one_line(
    command: Callable[..., tuple[int, str, str]], network: str, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, _, error = command("export", network, "--input", SHAPE, "-o", tmp_path / "out", *arguments)
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
