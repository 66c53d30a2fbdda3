"""The models that mobilemix ships: one literal table, readable without importing torch.

Published figures are the papers' own: parameters, multiply-adds (counted once, as the papers' "FLOPs") at `input_size`,
and ImageNet-1k top-1. `mobilemix models` prints them beside what mobilemix counts.
"""

import dataclasses
import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mobilemix import assets
from mobilemix.errors import CheckpointError, InputError, UnknownNameError

if TYPE_CHECKING:
    from torch import nn

_COUNTS = ("num_classes", "in_channels")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
IMAGENET_LABELS = "imagenet1k.txt"


@dataclasses.dataclass(frozen=True)
class Family:
    """A backbone family: one module of `mobilemix.models`, one paper.

    Attributes:
        module: name of the module in `mobilemix.models` that holds `build` and `options_from_checkpoint`.
        title: the name that the authors gave it.
        paper: arXiv identifier.
        source: the authors' repository, or None where none was found.
    """

    module: str
    title: str
    paper: str
    source: str | None


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """One variant: how to build it, what it takes, and what its authors reported.

    Attributes:
        name: registry name.
        variant: name of the architecture within its family; a trained model is another entry of the same variant.
        family: where it comes from.
        input_size: height and width in pixels of the published figures.
        published_parameters: millions, None where not published.
        published_gmacs: multiply-adds in 10^9, None where not published.
        published_top1: ImageNet-1k top-1 in per cent, None where it is not an ImageNet model.
        options: keyword arguments of `build` that this entry fixes.
        weights: checkpoint in `mobilemix/assets`, None for an untrained architecture.
        labels: labels file in `mobilemix/assets`.
        mean, std: per-channel normalisation of [0, 1] RGB.
        crop_pct: share of the resized image's side that the centre crop keeps.
    """

    name: str
    variant: str
    family: Family
    input_size: int
    published_parameters: float | None = None
    published_gmacs: float | None = None
    published_top1: float | None = None
    options: tuple[tuple[str, Any], ...] = ()
    weights: str | None = None
    labels: str = IMAGENET_LABELS
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_pct: float = 0.95


AFFNET = Family("affnet", "AFFNet", "2307.14008", "microsoft/TokenMixers")
CASVIT = Family("casvit", "CAS-ViT", "2408.03703", "Tianfang-Zhang/CAS-ViT")
EFFICIENTVIM = Family("efficientvim", "EfficientViM", "2411.15241", "mlvlab/EfficientViM")
DUALTOKEN_VIT = Family("dualtoken_vit", "DualToken-ViT", "2309.12424", None)

_SPECS = (
    ModelSpec("affnet_et", "affnet_et", AFFNET, 256, 1.4, 0.4, 73.0),
    ModelSpec("affnet_t", "affnet_t", AFFNET, 256, 2.6, 0.8, 77.0),
    ModelSpec("affnet", "affnet", AFFNET, 256, 5.5, 1.5, 79.8),
    ModelSpec("casvit_xs", "casvit_xs", CASVIT, 224, 3.20, 0.560, 78.3),
    ModelSpec("casvit_s", "casvit_s", CASVIT, 224, 5.76, 0.932, 80.9),
    ModelSpec("casvit_m", "casvit_m", CASVIT, 224, 12.42, 1.887, 82.8),
    ModelSpec("casvit_t", "casvit_t", CASVIT, 224, 21.76, 3.597, 83.9),
    ModelSpec("efficientvim_m1", "efficientvim_m1", EFFICIENTVIM, 224, 6.7, 0.239, 72.9),
    ModelSpec("efficientvim_m2", "efficientvim_m2", EFFICIENTVIM, 224, 13.9, 0.355, 75.4),
    ModelSpec("efficientvim_m3", "efficientvim_m3", EFFICIENTVIM, 224, 16.6, 0.656, 77.6),
    ModelSpec("efficientvim_m4", "efficientvim_m4", EFFICIENTVIM, 256, 19.6, 1.111, 79.4),
    ModelSpec("dualtoken_vit_tiny", "dualtoken_vit_tiny", DUALTOKEN_VIT, 224, None, 0.5, 75.4),
    ModelSpec("dualtoken_vit_small", "dualtoken_vit_small", DUALTOKEN_VIT, 224, None, 1.0, 79.4),
    ModelSpec(
        "affnet_et_flowers",
        "affnet_et",
        AFFNET,
        160,
        options=(("num_classes", 5),),
        weights="affnet_et_flowers.safetensors",
        labels="affnet_et_flowers.txt",
    ),
)

MODELS = {spec.name: spec for spec in _SPECS}


def list_models() -> list[str]:
    """Names of every model that `create_model` takes, in the table's order."""
    return list(MODELS)


def find(name: str) -> ModelSpec:
    """The entry called `name`.

    Raises:
        UnknownNameError: no such entry; the message suggests the closest.
    """
    try:
        return MODELS[name]
    except KeyError:
        raise UnknownNameError("model", name, MODELS) from None


def build(spec: ModelSpec, **options: Any) -> "nn.Module":
    """An untrained module of the entry's architecture in eval mode; `options` override the entry's own.

    Raises:
        InputError: an option that the family does not have, or a count below one.
    """
    module = _module(spec)
    valid = [
        name
        for name, option in inspect.signature(module.build).parameters.items()
        if option.kind is option.KEYWORD_ONLY
    ]
    for name, value in options.items():
        if name not in valid:
            raise InputError(f"{spec.name} has no option '{name}'; valid: {', '.join(valid)}")
        if name in _COUNTS and (type(value) is not int or value < 1):
            raise InputError(f"{name} must be a positive integer, not {value!r}")
    model: nn.Module = module.build(spec.variant, **{**dict(spec.options), **options})
    return model.eval()


def create_model(name: str, *, weights: Path | str | None = None, **options: Any) -> "nn.Module":
    """The model called `name` in eval mode, with the weights of a checkpoint where there is one.

    Args:
        name: a name of `list_models()`.
        weights: safetensors or torch checkpoint; None takes those that ship with the entry, or fresh ones.
        options: keyword arguments of the family's `build`, such as num_classes, in_channels and features_only. Those
            that a checkpoint implies (its number of classes, its norm) need not be given.

    Raises:
        UnknownNameError: no such model.
        InputError: an option that the family does not have.
        CheckpointError: the checkpoint cannot be read or does not fit the model.
    """
    spec = find(name)
    path = Path(weights) if weights is not None else assets.path(spec.weights) if spec.weights else None
    if path is None:
        return build(spec, **options)
    from mobilemix.models import checkpoint

    state_dict = checkpoint.read_state_dict(path)
    try:
        implied = _module(spec).options_from_checkpoint(state_dict)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    model = build(spec, **{**implied, **options})
    if options.get("features_only"):  # a classifier's checkpoint serves a dense model, whose head is another
        state_dict = {key: value for key, value in state_dict.items() if key in model.state_dict()}
    checkpoint.load_weights(model, state_dict, str(path))
    return model


def _module(spec: ModelSpec) -> ModuleType:
    return importlib.import_module(f"mobilemix.models.{spec.family.module}")
