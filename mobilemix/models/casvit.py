"""CAS-ViT: a mobile backbone whose self-attention adds query and key maps instead of multiplying them.

Paper: Zhang, Li, Zhou, Liu, Qian, Hwang, Ji, "CAS-ViT: Convolutional Additive Self-attention Vision Transformers for
Efficient Mobile Applications", arXiv 2408.03703. Official code: https://github.com/Tianfang-Zhang/CAS-ViT, where the
model is called RCViT (MIT). State-dict names, shapes and order are the official ones, so that the authors' checkpoints
load with ``strict=True``: those of the classifiers in `classification` and, without the prefix of the detector around
them, those of the backbones in `detection` and `segmentation`.

Deviations from the official code: dropout and stochastic depth, which only training uses, are left out, and in
training mode the dense backbones update their batch norms, which the official ones keep frozen.

The official code orders a block as local perception, then attention, then MLP, with a skip connection around each.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mobilemix.errors import CheckpointError, UnknownNameError
from mobilemix.models.common import check_image, linear_head

MLP_RATIO = 4


@dataclass(frozen=True)
class Config:
    """Blocks and channels of the four stages."""

    blocks: tuple[int, int, int, int]
    channels: tuple[int, int, int, int]


VARIANTS: Mapping[str, Config] = {
    "casvit_xs": Config((2, 2, 4, 2), (48, 56, 112, 220)),
    "casvit_s": Config((3, 3, 6, 3), (48, 64, 128, 256)),
    "casvit_m": Config((3, 3, 6, 3), (64, 96, 192, 384)),
    "casvit_t": Config((3, 3, 6, 3), (96, 128, 256, 512)),
}


class Gate(nn.Module):
    """Multiplies its input by the map in (0, 1) that `layers` compute from it."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.block = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.block(x)  # type: ignore[no-any-return]


class AdditiveAttention(nn.Module):
    """The paper's convolutional additive token mixer (CATM): Γ(Φ(q) + Φ(k)) ⊙ v, then a depthwise projection.

    Φ gates positions, then channels; Γ is a depthwise convolution. Shapes: (B, C, H, W) to (B, C, H, W).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.oper_q = _interaction(channels)
        self.oper_k = _interaction(channels)
        self.dwc = _depthwise(channels)
        self.proj = _depthwise(channels)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=1)
        return self.proj(self.dwc(self.oper_q(q) + self.oper_k(k)) * v)  # type: ignore[no-any-return]


class Block(nn.Module):
    """Local perception, additive attention and MLP, each added to its input."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = MLP_RATIO * channels
        perception = nn.Sequential(
            nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels),
            _depthwise(channels),
            nn.GELU(),
            nn.Conv2d(channels, channels, 1),
        )
        self.local_perception = nn.Sequential(OrderedDict(network=perception))
        self.norm1 = nn.BatchNorm2d(channels)
        self.attn = AdditiveAttention(channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Conv2d(channels, hidden, 1), act=nn.GELU(), fc2=nn.Conv2d(hidden, channels, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.local_perception(x)
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


def _depthwise(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels)


def _interaction(channels: int) -> nn.Sequential:
    spatial = Gate(_depthwise(channels), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 1, 1, bias=False))
    channel = Gate(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, channels, 1, bias=False))
    return nn.Sequential(spatial, channel)


def _stem(in_channels: int, channels: int) -> nn.Sequential:
    half = channels // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, half, 3, stride=2, padding=1),
        nn.BatchNorm2d(half),
        nn.ReLU(),
        nn.Conv2d(half, channels, 3, stride=2, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    )


def _downsample(in_channels: int, channels: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
    return nn.Sequential(OrderedDict(proj=conv, norm=nn.BatchNorm2d(channels)))


class Backbone(nn.Module):
    """Stem and four stages of stride 4, 8, 16 and 32; odd sizes round up at each halving."""

    def __init__(self, config: Config, in_channels: int):
        super().__init__()
        self.in_channels = in_channels
        self.patch_embed = _stem(in_channels, config.channels[0])
        # Stages and downsamplings alternate, so the stages are the even entries.
        self.network = nn.ModuleList()
        for index, (blocks, channels) in enumerate(zip(config.blocks, config.channels, strict=True)):
            if index > 0:
                self.network.append(_downsample(config.channels[index - 1], channels))
            self.network.append(nn.Sequential(*(Block(channels) for _ in range(blocks))))

    def stages(self, x: Tensor) -> list[Tensor]:
        """Outputs of the four stages, (B, channels, H / stride, W / stride) each.

        Raises:
            InputError: `x` is not an image (B, in_channels, H, W).
        """
        check_image(x, self.in_channels)
        x = self.patch_embed(x)
        maps = []
        for layer in self.network:
            x = layer(x)
            maps.append(x)
        return maps[::2]


class CASViT(Backbone):
    """Image (B, in_channels, H, W) to logits (B, num_classes), for any H and W from one pixel up.

    With `distillation` there is a second head, taught by the teacher: training mode returns the logits of both,
    eval mode their mean.
    """

    def __init__(self, config: Config, num_classes: int, in_channels: int, distillation: bool):
        super().__init__(config, in_channels)
        width = config.channels[-1]
        self.norm = nn.BatchNorm2d(width)
        self.head = linear_head(width, num_classes)
        self.dist_head = linear_head(width, num_classes) if distillation else None

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        pooled = self.norm(self.stages(image)[-1]).mean((-2, -1))
        logits: Tensor = self.head(pooled)
        if self.dist_head is None:
            return logits
        distilled: Tensor = self.dist_head(pooled)
        return (logits, distilled) if self.training else (logits + distilled) / 2


class CASViTFeatures(Backbone):
    """Image to the list of the four stages' feature maps, each through a norm of its own."""

    def __init__(self, config: Config, in_channels: int):
        super().__init__(config, in_channels)
        # The official names count entries of `network`.
        self.norm0, self.norm2, self.norm4, self.norm6 = map(nn.BatchNorm2d, config.channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        norms = (self.norm0, self.norm2, self.norm4, self.norm6)
        return [norm(features) for norm, features in zip(norms, self.stages(image), strict=True)]


def build(
    variant: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    features_only: bool = False,
    distillation: bool = True,
) -> nn.Module:
    """Builds `variant`: casvit_xs, casvit_s, casvit_m or casvit_t, with new weights.

    The model maps an image (B, in_channels, H, W) to logits (B, num_classes), or with `features_only` to the list of
    the four stages' feature maps. `distillation` adds the second head; the official default is True.

    Raises:
        UnknownNameError: there is no such variant.
    """
    if variant not in VARIANTS:
        raise UnknownNameError("CAS-ViT variant", variant, VARIANTS)
    config = VARIANTS[variant]
    if features_only:
        return CASViTFeatures(config, in_channels)
    return CASViT(config, num_classes, in_channels, distillation)


def options_from_checkpoint(state_dict: Mapping[str, Tensor]) -> dict[str, object]:
    """Keyword arguments of `build` that a checkpoint implies: in_channels, and what it says of heads.

    A classifier's tells num_classes and distillation; one without heads is a dense backbone's, hence features_only.

    Raises:
        CheckpointError: the state dict is not a CAS-ViT's.
    """
    stem, head = (state_dict.get(name) for name in ("patch_embed.0.weight", "head.weight"))
    if stem is None:
        raise CheckpointError("not a CAS-ViT checkpoint: it has no tensor 'patch_embed.0.weight'")
    options: dict[str, object] = {"in_channels": stem.shape[1]}
    if head is None:
        return options | {"features_only": True}
    return options | {"num_classes": head.shape[0], "distillation": "dist_head.weight" in state_dict}
