import importlib
import sys
import warnings
from typing import Any

import pytest
import torch
from models_checks import distinct, image
from torch import nn

from mobilemix import assets
from mobilemix.errors import InputError, MissingDependencyError
from mobilemix.models import registry

ROUNDING = 1e-5
PLAIN = {"casvit": {"distillation": False}}  # options that give one output in training mode
SMALL = ["affnet_et", "casvit_xs", "dualtoken_vit_tiny"]
STAGES = {
    "affnet_et": ([32, 48, 64, 104, 144], [2, 4, 8, 16, 32]),
    "casvit_xs": ([48, 56, 112, 220], [4, 8, 16, 32]),
    "dualtoken_vit_tiny": ([48, 96, 192], [8, 16, 32]),
}


@pytest.fixture(scope="module")
def timm() -> Any:
    try:
        module = importlib.import_module("timm")
        importlib.import_module("mobilemix.models.timm")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    except Exception as error:  # torchvision, which timm imports, breaks in as many ways as there are builds of it
        pytest.skip(f"timm cannot be imported here, for want of timm or of a torchvision that fits torch: {error}")
    return module


def test_import_without_timm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.models", None)
    monkeypatch.delitem(sys.modules, "mobilemix.models.timm", raising=False)
    with pytest.raises(MissingDependencyError, match=r"pip install 'mobilemix\[timm\]'"):
        importlib.import_module("mobilemix.models.timm")


def test_every_name_is_in_timms_registry_and_timms_own_stay_its_own(timm: Any) -> None:
    homes = {name: timm.model_entrypoint(name).__module__ for name in registry.list_models()}
    assert {homes["affnet_t"], homes["casvit_xs"], homes["dualtoken_vit_small"]} == {"mobilemix.models.timm"}
    for name, home in homes.items():
        own = importlib.import_module(home)
        assert home == "mobilemix.models.timm" or getattr(own, name) is timm.model_entrypoint(name)


@pytest.mark.parametrize("name", SMALL)
def test_classifiers_take_timms_options(timm: Any, name: str) -> None:
    options = PLAIN.get(registry.find(name).family.module, {})
    model = timm.create_model(name, num_classes=7, in_chans=1, **options)
    assert isinstance(model, nn.Module)
    assert model.training
    assert model.num_classes == 7
    assert model(image(2, 1, 64, 64)).shape == (2, 7)


# timm 1.0.31 has an EfficientViM of its own, with norms of shape (C,) for (1, C, 1): two implementations are compared.
@pytest.mark.parametrize("name", [*SMALL, "efficientvim_m1"])
def test_weights_are_exchanged_with_mobilemix(timm: Any, name: str) -> None:
    ours, model = distinct(registry.create_model(name)), timm.create_model(name).eval()
    shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
    model.load_state_dict({key: tensor.reshape(shapes[key]) for key, tensor in ours.state_dict().items()}, strict=True)
    with torch.no_grad():
        found, expected = model(image(1, 3, 64, 64)), ours(image(1, 3, 64, 64))
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("name", SMALL)
def test_preprocessing_and_layers_are_described(timm: Any, name: str) -> None:
    spec, model = registry.find(name), timm.create_model(name)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, spec.input_size, spec.input_size)
    assert (config["mean"], config["std"], config["crop_pct"]) == (spec.mean, spec.std, spec.crop_pct)
    assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
    for classifier in model.pretrained_cfg["classifier"]:
        assert model.get_submodule(classifier).out_features == 1000


@pytest.mark.parametrize("name", SMALL)
def test_features_tell_their_channels_and_strides(timm: Any, name: str) -> None:
    channels, strides = STAGES[name]
    backbone = timm.create_model(name, features_only=True, in_chans=1)
    assert (backbone.feature_info.channels(), backbone.feature_info.reduction()) == (channels, strides)
    maps = backbone(image(2, 1, 64, 64))
    expected = [(2, width, 64 // stride, 64 // stride) for width, stride in zip(channels, strides, strict=True)]
    assert [tuple(features.shape) for features in maps] == expected


@pytest.mark.parametrize(("out_indices", "strides"), [((1, 3), [4, 16]), ((-1,), [32]), (2, [16, 32])])
def test_out_indices_choose_feature_maps(timm: Any, out_indices: Any, strides: list[int]) -> None:
    backbone = timm.create_model("affnet_et", features_only=True, out_indices=out_indices)
    assert backbone.feature_info.reduction() == strides
    assert [64 // features.shape[-1] for features in backbone(image(2, 3, 64, 64))] == strides


def test_feature_maps_that_are_not_there_are_refused(timm: Any) -> None:
    with pytest.raises(InputError, match="there are 3 feature maps"):
        timm.create_model("dualtoken_vit_tiny", features_only=True, out_indices=(0, 4))


def test_dropout_is_ignored_aloud(timm: Any) -> None:
    with pytest.warns(UserWarning, match="affnet_et has no dropout or stochastic depth: drop_rate is ignored"):
        timm.create_model("affnet_et", drop_rate=0.1)
    with warnings.catch_warnings(action="error"):
        timm.create_model("affnet_et", drop_rate=0.0, drop_path_rate=None)


def test_unknown_options_are_refused(timm: Any) -> None:
    with pytest.raises(InputError, match="affnet_et has no option 'window'"):
        timm.create_model("affnet_et", window=7)


def test_pretrained_loads_what_ships_and_adapts_it(timm: Any) -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist for affnet_t"):
        timm.create_model("affnet_t", pretrained=True)
    spec = registry.find("affnet_et_flowers")
    assert spec.weights is not None
    if not assets.path(spec.weights).exists():
        pytest.skip("the checkpoint is not part of this checkout")
    ours, model = registry.create_model(spec.name), timm.create_model(spec.name, pretrained=True)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image(1, 3, 64, 64)), ours(image(1, 3, 64, 64)), rtol=0, atol=0)
    adapted = timm.create_model(spec.name, pretrained=True, num_classes=9, in_chans=1)
    assert adapted.num_classes == 9
    kept = adapted.get_parameter("conv_1x1_exp.block.conv.weight")
    assert torch.equal(kept, ours.get_parameter("conv_1x1_exp.block.conv.weight"))
