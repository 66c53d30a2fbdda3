"""EfficientViM: a mobile backbone whose token mixer is a state-space model with channel mixing inside its hidden state.

Paper: Lee, Choi, Kim, "EfficientViM: Efficient Vision Mamba with Hidden State Mixer based State Space Duality",
CVPR 2025, arXiv 2411.15241. Official code: https://github.com/mlvlab/EfficientViM (MIT). State-dict names, shapes and
order are the official ones, so that the authors' checkpoints load with ``strict=True``.

Deviations from the official code:

- maps need not be square: the official classifier recovers their side from a square root, so that it takes square
  images only. Nothing in the architecture asks for it; the number of hidden states is independent of the size;
- the transition parameter `A` is kept for the checkpoints alone. The official code adds it to the logits of a softmax
  over positions, where a constant cancels, so that it can neither act nor learn;
- the dense backbone does not freeze its stem and its batch norms in training mode.
"""

import functools
import itertools
import operator
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mobilemix.errors import CheckpointError, UnknownNameError
from mobilemix.models.common import ChannelNorm, check_image, linear_head

MLP_RATIO = 4
DOWNSAMPLE_EXPANSION = 4  # of the inverted residual between stages
SQUEEZE = 4  # of its squeeze-and-excitation
TRANSITION_RANGE = (1.0, 16.0)  # of the uniform initial A
GATE_INIT = 1e-4  # before the sigmoid


@dataclass(frozen=True)
class Config:
    """Channels, blocks and hidden states of the three stages."""

    channels: tuple[int, int, int]
    blocks: tuple[int, int, int]
    states: tuple[int, int, int]


VARIANTS: Mapping[str, Config] = {
    "efficientvim_m1": Config((128, 192, 320), (2, 2, 2), (49, 25, 9)),
    "efficientvim_m2": Config((128, 256, 512), (2, 2, 2), (49, 25, 9)),
    "efficientvim_m3": Config((224, 320, 512), (2, 2, 2), (49, 25, 9)),
    "efficientvim_m4": Config((224, 320, 512), (3, 4, 2), (64, 32, 16)),
}


class HiddenStateMixer(nn.Module):
    """The paper's HSM-SSD layer: state-space duality whose gate and output projection act on the hidden states.

    Every position is written into N hidden states, weighted by its b and by a softmax over positions, which is the
    discretised transition; the states are gated and projected; every position reads them back, weighted by its c.
    Shapes: (B, C, H·W) with `size` (H, W) to the mixed map (B, C, H, W) and the hidden states (B, C, N).
    """

    def __init__(self, channels: int, states: int):
        super().__init__()
        # A constant cancels in a softmax over positions: A is here for the checkpoints alone.
        self.A = nn.Parameter(torch.empty(states).uniform_(*TRANSITION_RANGE), requires_grad=False)
        self.D = nn.Parameter(torch.ones(1))
        self.BCdt_proj = _pointwise(channels, 3 * states)
        conv = nn.Conv2d(3 * states, 3 * states, 3, padding=1, groups=3 * states, bias=False)
        self.dw = nn.Sequential(OrderedDict(conv=conv))
        self.hz_proj = _pointwise(channels, 2 * channels)
        self.out_proj = _pointwise(channels, channels)

    def forward(self, x: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        b, c, dt = self.dw(self.BCdt_proj(x).unflatten(-1, size)).flatten(2).chunk(3, dim=1)
        states = x @ (dt.softmax(-1) * b).transpose(-2, -1)
        h, z = self.hz_proj(states).chunk(2, dim=1)
        states = self.out_proj(h * (F.silu(z) + self.D))
        return (states @ c).unflatten(-1, size), states


class Block(nn.Module):
    """Depthwise convolution, hidden-state mixer, depthwise convolution, MLP: each blended with its input by a gate."""

    def __init__(self, channels: int, states: int):
        super().__init__()
        hidden = MLP_RATIO * channels
        self.alpha = nn.Parameter(torch.full((4, channels), GATE_INIT))
        self.mixer = HiddenStateMixer(channels, states)
        self.norm = ChannelNorm(channels, dims=3)
        self.dwconv1 = _depthwise(channels)
        self.dwconv2 = _depthwise(channels)
        self.ffn = nn.Sequential(OrderedDict(fc1=_conv(channels, hidden, 1, act=True), fc2=_conv(hidden, channels, 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.alpha.sigmoid()[..., None, None].unbind()
        x = _blend(x, self.dwconv1(x), gates[0])
        mixed, states = self.mixer(self.norm(x.flatten(2)), x.shape[2:])
        x = _blend(x, mixed, gates[1])
        x = _blend(x, self.dwconv2(x), gates[2])
        return _blend(x, self.ffn(x), gates[3]), states


class SqueezeExcite(nn.Module):
    """Channel attention from the mean over positions (arXiv 1709.01507)."""

    def __init__(self, channels: int):
        super().__init__()
        squeezed = channels // SQUEEZE
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(F.relu(self.fc1(x.mean((-2, -1), keepdim=True)))).sigmoid()  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """Halves height and width, rounding up: an inverted residual with squeeze-and-excitation between two residuals."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        hidden = DOWNSAMPLE_EXPANSION * channels
        self.conv = nn.Sequential(
            _conv(in_channels, hidden, 1, act=True),
            _conv(hidden, hidden, 3, stride=2, groups=hidden, act=True),
            SqueezeExcite(hidden),
            _conv(hidden, channels, 1),
        )
        self.dwconv1 = _depthwise(in_channels)
        self.dwconv2 = _depthwise(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x + self.dwconv1(x))
        return x + self.dwconv2(x)  # type: ignore[no-any-return]


class Stage(nn.Module):
    """Blocks; the map and the hidden states of the last of them, and the map that the next stage starts from."""

    def __init__(self, channels: int, blocks: int, states: int, downsample: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(Block(channels, states) for _ in range(blocks))
        self.downsample = downsample

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        for block in self.blocks:
            x, states = block(x)
        return x, states, self.downsample(x)


def _conv(
    in_channels: int, channels: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = False
) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers: list[tuple[str, nn.Module]] = [("conv", conv), ("norm", nn.BatchNorm2d(channels))]
    return nn.Sequential(OrderedDict([*layers, ("act", nn.ReLU())] if act else layers))


def _depthwise(channels: int) -> nn.Sequential:
    return _conv(channels, channels, 3, groups=channels)


def _pointwise(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv1d(in_channels, channels, 1, bias=False)))


def _stem(in_channels: int, channels: int) -> nn.Sequential:
    widths = (in_channels, channels // 8, channels // 4, channels // 2, channels)
    convs = (_conv(a, b, 3, stride=2, act=b != channels) for a, b in itertools.pairwise(widths))
    return nn.Sequential(OrderedDict(conv=nn.Sequential(*convs)))


def _blend(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return (1 - gate) * x + gate * y


class Backbone(nn.Module):
    """Stem of stride 16 and three stages of stride 16, 32 and 64; odd sizes round up at each halving."""

    def __init__(self, config: Config, in_channels: int):
        super().__init__()
        self.in_channels = in_channels
        self.patch_embed = _stem(in_channels, config.channels[0])
        downsamples = [*itertools.starmap(Downsample, itertools.pairwise(config.channels)), nn.Identity()]
        settings = zip(config.channels, config.blocks, config.states, downsamples, strict=True)
        self.stages = nn.ModuleList(itertools.starmap(Stage, settings))

    def outputs(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Feature maps (B, C, H / stride, W / stride) and hidden states (B, C, N) of the three stages.

        Raises:
            InputError: `x` is not an image (B, in_channels, H, W).
        """
        check_image(x, self.in_channels)
        x = self.patch_embed(x)
        maps, hidden = [], []
        for stage in self.stages:
            features, states, x = stage(x)
            maps.append(features)
            hidden.append(states)
        return maps, hidden


class EfficientViM(Backbone):
    """Image (B, in_channels, H, W) to logits (B, num_classes), for any H and W from one pixel up.

    The logits fuse four heads, over the hidden states of each stage and the last map, with softmax weights.
    With `distillation` there is a second set of heads, taught by the teacher: training mode returns the logits of
    both, eval mode their mean.
    """

    def __init__(self, config: Config, num_classes: int, in_channels: int, distillation: bool):
        super().__init__(config, in_channels)
        widths = (*config.channels, config.channels[-1])
        self.weights = nn.Parameter(torch.ones(len(widths)))
        self.norm = nn.ModuleList(ChannelNorm(width, dims) for width, dims in zip(widths, (3, 3, 3, 4), strict=True))
        self.heads = _heads(widths, num_classes)
        self.weights_dist = nn.Parameter(torch.ones(len(widths))) if distillation else None
        self.heads_dist = _heads(widths, num_classes) if distillation else None

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        maps, hidden = self.outputs(image)
        sources = [*hidden, maps[-1]]
        pooled = [norm(source).flatten(2).mean(-1) for norm, source in zip(self.norm, sources, strict=True)]
        logits = _fuse(pooled, self.heads, self.weights)
        if self.heads_dist is None or self.weights_dist is None:
            return logits
        distilled = _fuse(pooled, self.heads_dist, self.weights_dist)
        return (logits, distilled) if self.training else (logits + distilled) / 2


class EfficientViMFeatures(Backbone):
    """Image to the list of the three stages' feature maps."""

    def forward(self, image: Tensor) -> list[Tensor]:
        return self.outputs(image)[0]


def _heads(widths: Iterable[int], num_classes: int) -> nn.ModuleList:
    return nn.ModuleList(linear_head(width, num_classes) for width in widths)


def _fuse(pooled: Iterable[Tensor], heads: Iterable[nn.Module], weights: Tensor) -> Tensor:
    shares = weights.softmax(0).unbind()
    logits: Iterator[Tensor] = (share * head(v) for share, head, v in zip(shares, heads, pooled, strict=True))
    return functools.reduce(operator.add, logits)


def build(
    variant: str,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    features_only: bool = False,
    distillation: bool = False,
) -> nn.Module:
    """Builds `variant`: efficientvim_m1, efficientvim_m2, efficientvim_m3 or efficientvim_m4, with new weights.

    The model maps an image (B, in_channels, H, W) to logits (B, num_classes), or with `features_only` to the list of
    the three stages' feature maps. `distillation` adds the second set of heads; the official default is False.

    Raises:
        UnknownNameError: there is no such variant.
    """
    if variant not in VARIANTS:
        raise UnknownNameError("EfficientViM variant", variant, VARIANTS)
    config = VARIANTS[variant]
    if features_only:
        return EfficientViMFeatures(config, in_channels)
    return EfficientViM(config, num_classes, in_channels, distillation)


def options_from_checkpoint(state_dict: Mapping[str, Tensor]) -> dict[str, object]:
    """Keyword arguments of `build` that a checkpoint implies: in_channels, and what it says of heads.

    A classifier's tells num_classes and distillation; one without heads is a dense backbone's, hence features_only.

    Raises:
        CheckpointError: the state dict is not an EfficientViM's.
    """
    stem, head = (state_dict.get(name) for name in ("patch_embed.conv.0.conv.weight", "heads.0.weight"))
    if stem is None:
        raise CheckpointError("not an EfficientViM checkpoint: it has no tensor 'patch_embed.conv.0.conv.weight'")
    options: dict[str, object] = {"in_channels": stem.shape[1]}
    if head is None:
        return options | {"features_only": True}
    return options | {"num_classes": head.shape[0], "distillation": "weights_dist" in state_dict}
