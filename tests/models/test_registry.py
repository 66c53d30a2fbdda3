import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from mobilemix import assets
from mobilemix.errors import CheckpointError, InputError, UnknownNameError
from mobilemix.models import affnet, checkpoint, registry


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A batch-norm AFFNet-ET with three classes and one input channel, stored in float16."""
    torch.manual_seed(0)
    model = affnet.build("affnet_et", num_classes=3, in_channels=1, norm="batch")
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("name", registry.list_models())
def test_every_entry_is_built_in_eval_mode(name: str) -> None:
    spec = registry.find(name)
    model = registry.build(spec)
    assert not any(module.training for module in model.modules())
    assert sum(parameter.numel() for parameter in model.parameters()) > 500_000


def test_names_are_unique() -> None:
    assert len(registry.MODELS) == len(registry._SPECS)


def test_checkpoint_fills_the_options_that_it_implies(weights: Path) -> None:
    model = registry.create_model("affnet_et", weights=weights)
    assert not model.training
    assert model.get_submodule("classifier.fc").out_features == 3
    stored = checkpoint.read_state_dict(weights)
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, stored[name].to(tensor.dtype), rtol=0, atol=0)


def test_features_take_the_same_checkpoint(weights: Path) -> None:
    model = registry.create_model("affnet_et", weights=str(weights), features_only=True)
    with torch.no_grad():
        assert len(model(torch.zeros(1, 1, 64, 64))) == 5


def test_options_of_the_caller_win_over_the_checkpoint(weights: Path) -> None:
    with pytest.raises(CheckpointError, match=r"classifier\.fc\.weight is \(3, 576\), the model has \(9, 576\)"):
        registry.create_model("affnet_et", weights=weights, num_classes=9)


def test_checkpoint_of_another_variant_is_refused(weights: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights\.safetensors does not fit the model: .* more tensors differ"):
        registry.create_model("affnet_t", weights=weights)


def test_checkpoint_of_another_family_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"other\.safetensors: not an AFFNet checkpoint"):
        registry.create_model("affnet_et", weights=path)


def test_shipped_weights_load_unless_others_are_given(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = dataclasses.replace(registry.find("affnet_et"), name="shipped", weights=weights.name)
    monkeypatch.setitem(registry.MODELS, "shipped", spec)
    monkeypatch.setattr(assets, "path", lambda name: weights.parent / name)
    assert registry.create_model("shipped").get_submodule("classifier.fc").out_features == 3
    with pytest.raises(CheckpointError, match=r"missing\.pth: no such checkpoint"):
        registry.create_model("shipped", weights="missing.pth")


def test_unknown_names_and_options_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'affnet_t'"):
        registry.create_model("affnet-t")
    with pytest.raises(
        InputError, match="affnet_t has no option 'classes'; valid: num_classes, in_channels, features_only"
    ):
        registry.create_model("affnet_t", classes=3)


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True, None])
def test_counts_must_be_positive(value: object) -> None:
    with pytest.raises(InputError, match="num_classes must be a positive integer"):
        registry.create_model("affnet_et", num_classes=value)


def test_the_table_is_readable_without_torch() -> None:
    code = "import sys, mobilemix.models.registry; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_dense_model_takes_a_classifiers_checkpoint(tmp_path: Path) -> None:
    classifier = registry.create_model("efficientvim_m1", num_classes=3)
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    dense = registry.create_model("efficientvim_m1", weights=tmp_path / "classifier.pth", features_only=True)
    assert torch.equal(dense.patch_embed.conv[0].conv.weight, classifier.patch_embed.conv[0].conv.weight)
    with pytest.raises(CheckpointError, match="norm0"):  # CAS-ViT's dense form has norms that its classifier has not
        torch.save(registry.create_model("casvit_xs").state_dict(), tmp_path / "casvit.pth")
        registry.create_model("casvit_xs", weights=tmp_path / "casvit.pth", features_only=True)
