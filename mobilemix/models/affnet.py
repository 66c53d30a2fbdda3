"""AFFNet: a mobile backbone whose token mixer is an adaptive filter in the frequency domain.

Paper: Huang, Zhang, Lan, Zha, Lu, Guo, "Adaptive Frequency Filters As Efficient Global Token Mixers", ICCV 2023,
arXiv 2307.14008. Official code: https://github.com/microsoft/TokenMixers, folder "Adaptive Frequency Filters" (MIT),
which builds on Apple's CVNets. State-dict names, shapes and order are the official ones, so that the authors'
checkpoints load with ``strict=True``.

Deviations from the official code:

- the options it never switches on are left out: dilated stages, dropout, stochastic depth, double skips, stages
  without fusion, and the widths beyond the three published variants;
- the filter runs in the dtype of its input; the official code always casts it to float32.

The official code orders a block as local mixing, then global mixing, the reverse of the paper's figure. This file
follows the code, since the checkpoints do.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemix.errors import CheckpointError, UnknownNameError
from mobilemix.models.common import check_image, linear_head

Norm = Literal["layer", "batch"]
NORMS: tuple[Norm, ...] = get_args(Norm)

STEM_CHANNELS = 16
LOCAL_BLOCKS = (1, 3)  # inverted residuals in stages 1 and 2
FILTER_BLOCKS = (2, 4, 3)  # frequency-filter blocks in stages 3, 4 and 5
MIXER_EXPANSION = 2  # of the inverted residual inside a frequency-filter block
FILTER_GROUPS = 8  # diagonal blocks of the channel-mixing matrices
SPARSITY = 0.01  # soft-shrinkage threshold of the filters
FILTER_INIT_STD = 0.02
HEAD_EXPANSION, HEAD_CHANNELS_MAX = 4, 960


@dataclass(frozen=True)
class Config:
    """Output channels of the five stages, and the expansion of the inverted residuals between filter blocks."""

    channels: tuple[int, int, int, int, int]
    expansion: int


VARIANTS: Mapping[str, Config] = {
    "affnet_et": Config((32, 48, 64, 104, 144), expansion=2),
    "affnet_t": Config((32, 48, 96, 160, 192), expansion=4),
    "affnet": Config((32, 64, 128, 256, 320), expansion=4),
}


class ConvLayer(nn.Module):
    """Convolution without bias and batch norm, then SiLU where `act`."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True
    ):
        super().__init__()
        conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        layers: list[tuple[str, nn.Module]] = [("conv", conv), ("norm", nn.BatchNorm2d(out_channels))]
        self.block = nn.Sequential(OrderedDict([*layers, ("act", nn.SiLU())] if act else layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)  # type: ignore[no-any-return]


class InvertedResidual(nn.Module):
    """MobileNetV2's inverted residual (arXiv 1801.04381): expand, depthwise 3x3, project, skip where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        hidden = in_channels * expansion
        self.block = nn.Sequential(
            OrderedDict(
                exp_1x1=ConvLayer(in_channels, hidden, 1),
                conv_3x3=ConvLayer(hidden, hidden, 3, stride, groups=hidden),
                red_1x1=ConvLayer(hidden, out_channels, 1, act=False),
            )
        )
        self.skip = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return x + y if self.skip else y


class AdaptiveFrequencyFilter(nn.Module):
    """Global token mixer: a spectrum times a mask computed from it, back to space, plus the input (paper, eq. 5).

    The mask is a two-layer complex MLP over channels with block-diagonal weights, shared by all frequencies, then a
    soft shrinkage that zeroes small entries. Parameters hold the real part at index 0 and the imaginary part at 1:
    weights (2, groups, C/groups in, C/groups out), biases (2, groups, C/groups).
    """

    def __init__(self, channels: int):
        super().__init__()
        width = channels // FILTER_GROUPS
        self.w1 = nn.Parameter(FILTER_INIT_STD * torch.randn(2, FILTER_GROUPS, width, width))
        self.b1 = nn.Parameter(FILTER_INIT_STD * torch.randn(2, FILTER_GROUPS, width))
        self.w2 = nn.Parameter(FILTER_INIT_STD * torch.randn(2, FILTER_GROUPS, width, width))
        self.b2 = nn.Parameter(FILTER_INIT_STD * torch.randn(2, FILTER_GROUPS, width))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(x, norm="ortho")
        blocks = spectrum.unflatten(1, (FILTER_GROUPS, -1))
        # SiLU acts on real and imaginary parts separately: there is no complex activation here.
        real, imag = _complex_linear(blocks.real, blocks.imag, self.w1, self.b1)
        real, imag = _complex_linear(F.silu(real), F.silu(imag), self.w2, self.b2)
        mask = torch.complex(F.softshrink(real, SPARSITY), F.softshrink(imag, SPARSITY)).flatten(1, 2)
        filtered: Tensor = torch.fft.irfft2(spectrum * mask, s=x.shape[-2:], norm="ortho")
        return x + filtered


def _complex_linear(real: Tensor, imag: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Complex block-diagonal linear map over channels: (B, groups, in, H, W) to (B, groups, out, H, W), twice."""

    def mix(part: Tensor, matrix: Tensor) -> Tensor:
        return torch.einsum("bgihw,gio->bgohw", part, matrix)

    bias = bias[..., None, None]
    return (
        mix(real, weight[0]) - mix(imag, weight[1]) + bias[0],
        mix(imag, weight[0]) + mix(real, weight[1]) + bias[1],
    )


class FilterBlock(nn.Module):
    """Local mixing by an inverted residual, then global mixing by a frequency filter, under one skip connection."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.norm1 = _norm(channels, norm)
        self.filter = AdaptiveFrequencyFilter(channels)
        self.norm2 = _norm(channels, norm)
        self.mlp = InvertedResidual(channels, channels, stride=1, expansion=MIXER_EXPANSION)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.filter(self.norm2(self.mlp(self.norm1(x))))  # type: ignore[no-any-return]


class FilterStage(nn.Module):
    """Filter blocks, a projection, and a fusion with the stage's input."""

    def __init__(self, channels: int, blocks: int, norm: Norm):
        super().__init__()
        self.global_rep = nn.Sequential(*(FilterBlock(channels, norm) for _ in range(blocks)), _norm(channels, norm))
        self.conv_proj = ConvLayer(channels, channels, 1, act=False)
        self.fusion = ConvLayer(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fusion(torch.cat((x, self.conv_proj(self.global_rep(x))), dim=1))  # type: ignore[no-any-return]


def _norm(channels: int, norm: Norm) -> nn.Module:
    # Layer norm here spans channels and positions of a sample, which is a group norm with one group.
    return nn.GroupNorm(1, channels) if norm == "layer" else nn.BatchNorm2d(channels)


class AFFNet(nn.Module):
    """Image (B, in_channels, H, W) to logits (B, num_classes), for any H and W from one pixel up.

    The stages' strides are 2, 4, 8, 16 and 32; odd sizes round up at each of them.
    """

    def __init__(self, config: Config, num_classes: int, in_channels: int, norm: Norm):
        super().__init__()
        self.in_channels = in_channels
        c1, c2, c3, c4, c5 = config.channels
        head = min(HEAD_EXPANSION * c5, HEAD_CHANNELS_MAX)
        self.conv_1 = ConvLayer(in_channels, STEM_CHANNELS, 3, stride=2)
        self.layer_1 = _local_stage(STEM_CHANNELS, c1, LOCAL_BLOCKS[0], 1, config.expansion)
        self.layer_2 = _local_stage(c1, c2, LOCAL_BLOCKS[1], 2, config.expansion)
        self.layer_3 = _filter_stage(c2, c3, FILTER_BLOCKS[0], config.expansion, norm)
        self.layer_4 = _filter_stage(c3, c4, FILTER_BLOCKS[1], config.expansion, norm)
        self.layer_5 = _filter_stage(c4, c5, FILTER_BLOCKS[2], config.expansion, norm)
        self.conv_1x1_exp = ConvLayer(c5, head, 1)
        self.classifier = nn.Sequential(OrderedDict(fc=linear_head(head, num_classes)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")

    def features(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the five stages, (B, channels, H / stride, W / stride) each."""
        check_image(x, self.in_channels)
        x = self.conv_1(x)
        maps = []
        for stage in (self.layer_1, self.layer_2, self.layer_3, self.layer_4, self.layer_5):
            x = stage(x)
            maps.append(x)
        return maps

    def forward(self, image: Tensor) -> Tensor:
        x = self.conv_1x1_exp(self.features(image)[-1])
        return self.classifier(x.mean((-2, -1)))  # type: ignore[no-any-return]


class AFFNetFeatures(AFFNet):
    """AFFNet whose output is the list of its five feature maps; the unused head lets checkpoints load strictly."""

    def forward(self, image: Tensor) -> list[Tensor]:  # type: ignore[override]
        return self.features(image)


def _local_stage(in_channels: int, out_channels: int, blocks: int, stride: int, expansion: int) -> nn.Sequential:
    first = InvertedResidual(in_channels, out_channels, stride, expansion)
    rest = (InvertedResidual(out_channels, out_channels, 1, expansion) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _filter_stage(in_channels: int, out_channels: int, blocks: int, expansion: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        InvertedResidual(in_channels, out_channels, 2, expansion), FilterStage(out_channels, blocks, norm)
    )


def build(
    variant: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    features_only: bool = False,
    norm: Norm = "layer",
) -> nn.Module:
    """Builds `variant`: affnet_et, affnet_t or affnet, with new weights.

    The model maps an image (B, in_channels, H, W) to logits (B, num_classes), or with `features_only` to the list of
    the five stages' feature maps. `norm` is the norm of the filter blocks; the official default is "layer".

    Raises:
        UnknownNameError: there is no such variant or norm.
    """
    if variant not in VARIANTS:
        raise UnknownNameError("AFFNet variant", variant, VARIANTS)
    if norm not in NORMS:
        raise UnknownNameError("AFFNet norm", norm, NORMS)
    kind = AFFNetFeatures if features_only else AFFNet
    return kind(VARIANTS[variant], num_classes, in_channels, norm)


def norm_of(state_dict: Mapping[str, Tensor]) -> Norm:
    """The norm of the filter blocks in an AFFNet checkpoint; only a batch norm keeps running statistics."""
    return "batch" if any(name.endswith(".norm1.running_mean") for name in state_dict) else "layer"


def options_from_checkpoint(state_dict: Mapping[str, Tensor]) -> dict[str, object]:
    """Keyword arguments of `build` that a checkpoint implies: norm, num_classes and in_channels.

    Raises:
        CheckpointError: the state dict is not an AFFNet's.
    """
    try:
        head, stem = state_dict["classifier.fc.weight"], state_dict["conv_1.block.conv.weight"]
    except KeyError as missing:
        raise CheckpointError(f"not an AFFNet checkpoint: it has no tensor {missing}") from None
    return {"norm": norm_of(state_dict), "num_classes": head.shape[0], "in_channels": stem.shape[1]}
