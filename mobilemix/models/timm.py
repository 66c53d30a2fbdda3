"""The backbones in timm's registry: after `import mobilemix.models.timm`, `timm.create_model("affnet_t")` works.

timm discovers no plug-ins by itself, hence the import. Names that timm has models of its own for stay timm's (1.0.31
has an EfficientViM). The entries take timm's own arguments: `num_classes` (one or more),
`in_chans`, `features_only` with `out_indices`, `checkpoint_path`, and `pretrained=True` for the entries that ship with
weights, adapted to other `num_classes` and `in_chans` as timm does; further ones go to the family's `build`. In
training mode a model with distillation heads, which CAS-ViT has unless `distillation=False`, gives two logits.

Raises:
    MissingDependencyError: on import, where timm is not installed.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mobilemix import assets
from mobilemix.errors import InputError, MissingDependencyError
from mobilemix.models import registry

try:
    from timm.models import FeatureInfo, build_model_with_cfg, is_model, register_model
except ModuleNotFoundError as error:
    raise MissingDependencyError("timm", "mobilemix.models.timm", "timm") from error

_FIRST_CONV = {
    "affnet": "conv_1.block.conv",
    "casvit": "patch_embed.0",
    "efficientvim": "patch_embed.conv.0.conv",
    "dualtoken_vit": "stem.0.0",
}
_CLASSIFIER = {
    "affnet": ("classifier.fc",),
    "casvit": ("head", "dist_head"),
    "efficientvim": ("heads.0", "heads.1", "heads.2", "heads.3"),
    "dualtoken_vit": ("head",),
}
_PROBE_SIZE = 256  # pixels; a multiple of every stride
_TRAINING_ONLY = ("drop_rate", "drop_path_rate")


class FeatureMaps(nn.Module):
    """A backbone in timm's form for dense tasks: image to the list of the feature maps that `out_indices` names.

    `feature_info` tells their channels and strides, as it does for timm's own.
    """

    def __init__(self, backbone: nn.Module, in_chans: int, out_indices: Sequence[int] | int | None):
        super().__init__()
        with torch.no_grad():
            maps = backbone.eval()(torch.zeros(1, in_chans, _PROBE_SIZE, _PROBE_SIZE))
        stages = [
            {"num_chs": features.shape[1], "reduction": _PROBE_SIZE // features.shape[2], "module": f"stage_{index}"}
            for index, features in enumerate(maps)
        ]
        count = len(stages)
        if out_indices is None:
            out_indices = range(count)
        elif isinstance(out_indices, int):  # the last so many, as in timm
            out_indices = range(-out_indices, 0)
        if not all(-count <= index < count for index in out_indices):
            raise InputError(f"there are {count} feature maps; out_indices {tuple(out_indices)} name others")
        self.backbone = backbone.train()
        self.out_indices = tuple(index % count for index in out_indices)
        self.feature_info = FeatureInfo(stages, self.out_indices)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.backbone(x)
        return [maps[index] for index in self.out_indices]


def _pretrained_cfg(spec: registry.ModelSpec) -> dict[str, Any]:
    """timm's description of the entry: input, normalisation, names of the layers that adaptation touches."""
    return {
        "file": str(assets.path(spec.weights)) if spec.weights else None,
        "input_size": (3, spec.input_size, spec.input_size),
        "interpolation": "bicubic",
        "crop_pct": spec.crop_pct,
        "mean": spec.mean,
        "std": spec.std,
        "num_classes": dict(spec.options).get("num_classes", 1000),
        "first_conv": _FIRST_CONV[spec.family.module],
        "classifier": _CLASSIFIER[spec.family.module],
        "origin_url": f"https://github.com/{spec.family.source}" if spec.family.source else None,
        "paper_ids": f"arXiv:{spec.family.paper}",
    }


def _build(spec: registry.ModelSpec, *, in_chans: int = 3, **options: Any) -> nn.Module:
    for name in _TRAINING_ONLY:
        if options.pop(name, 0.0):
            warnings.warn(f"{spec.name} has no dropout or stochastic depth: {name} is ignored", stacklevel=2)
    model = registry.build(spec, in_channels=in_chans, **options).train()
    model.num_classes = options.get("num_classes", 1000)
    return model


def _register(spec: registry.ModelSpec) -> None:
    def create(pretrained: bool = False, **options: Any) -> Any:
        # timm takes features_only out of the options and wraps what the builder gives.
        builder = functools.partial(_build, spec, features_only=options.get("features_only", False))
        wrapper = functools.partial(FeatureMaps, in_chans=options.get("in_chans", 3))
        feature_cfg = {"feature_cls": wrapper, "out_indices": None}
        return build_model_with_cfg(builder, spec.name, pretrained, feature_cfg=feature_cfg, **options)

    create.__name__ = spec.name
    register_model(create)


_specs = [spec for spec in registry.MODELS.values() if not is_model(spec.name)]
# timm looks the descriptions up under this name, in the module of the function that it registers.
default_cfgs = {spec.name: _pretrained_cfg(spec) for spec in _specs}
for _spec in _specs:
    _register(_spec)
