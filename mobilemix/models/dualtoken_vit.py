"""DualToken-ViT: convolutions for what is near, attention through 7x7 position-aware global tokens for what is far.

Paper: Chu, Chen, Chen, Wang, Wu, Huang, Qian, "DualToken-ViT: Position-aware Efficient Vision Transformer with Dual
Token Fusion", arXiv 2309.12424. It builds on the three-stage frame of LightViT (arXiv 2207.05557).

This is a reconstruction: neither an official implementation nor weights were found, so no checkpoint but mobilemix's
own loads, and the accuracies of the paper (75.4 % at 0.5 GFLOPs and 79.4 % at 1.0 GFLOPs) are not claimed for it.
What the paper leaves open is chosen in `VARIANTS` and the constants below, so that the multiply-adds at 224x224 match.

Where the reconstruction departs from LightViT's frame, for the sake of devices: maps stay channels-first, with 1x1
convolutions for linear layers, and patches are merged by a 2x2 convolution with stride 2 on normed positions, which is
LightViT's linear layer on four neighbours but for the norm's extent.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mobilemix.errors import CheckpointError, InputError, UnknownNameError
from mobilemix.models.common import ChannelNorm, check_image, linear_head

STRIDES = (8, 16, 32)  # of the three stages
GRID = 7  # global tokens per side
GATE_REDUCTION = 4  # of the channels inside the bi-dimensional attention
ENCODER_RATIO = 4  # hidden channels of the Conv Encoder, as in ConvNeXt
TOKEN_MLP_RATIO = 2  # hidden tokens of the token-mixing MLP
TOKEN_INIT_STD = 0.02
# Share of the carried tokens in each weighted sum: of the learned ones, 0.8^12 = 7 % reach the last of 12 blocks.
CARRIED = 0.8


@dataclass(frozen=True)
class Config:
    """Channels, blocks, attention heads and feed-forward expansion of the three stages."""

    channels: tuple[int, int, int]
    blocks: tuple[int, int, int]
    heads: tuple[int, int, int]
    mlp_ratios: tuple[int, int, int]


# Widths (of the larger), heads and expansions are LightViT-T's; the depths make up the published multiply-adds.
VARIANTS: Mapping[str, Config] = {
    "dualtoken_vit_tiny": Config((48, 96, 192), (2, 3, 5), (2, 4, 8), (8, 4, 4)),
    "dualtoken_vit_small": Config((64, 128, 256), (2, 5, 5), (2, 4, 8), (8, 4, 4)),
}


class ConvEncoder(nn.Module):
    """A ConvNeXt block (arXiv 2201.03545): depthwise 7x7, norm, expand, GELU, project, skip."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = ENCODER_RATIO * channels
        self.block = nn.Sequential(
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            ChannelNorm(channels, dims=4),
            nn.Conv2d(channels, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)  # type: ignore[no-any-return]


class PositionAwareTokens(nn.Module):
    """The paper's Position-aware Token Module: summarise the image, enrich the global tokens with it, tell the image.

    Takes the image tokens (B, C, H, W) and the global tokens (B, C, 7, 7); gives what the image tokens learn,
    (B, C, H, W), and the enriched global tokens, (B, C, 7, 7). `steps` halvings lead from (H, W) to the last stage's.
    """

    def __init__(self, channels: int, heads: int, steps: int):
        super().__init__()
        self.heads = heads
        halvings = (_conv_norm_act(channels, channels, stride=2, groups=channels) for _ in range(steps))
        self.downsample = nn.Sequential(*halvings, ChannelNorm(channels, dims=4))
        self.aggregate_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.aggregate_out = nn.Conv2d(channels, channels, 1)
        self.broadcast_q = nn.Sequential(ChannelNorm(channels, dims=4), nn.Conv2d(channels, channels, 1))
        self.broadcast_kv = nn.Sequential(ChannelNorm(channels, dims=4), nn.Conv2d(channels, 2 * channels, 1))
        self.broadcast_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        summary = _to_grid(self.downsample(x))
        queries, keys, values = self.aggregate_qkv(summary).chunk(3, dim=1)
        aggregated = self.aggregate_out(_attend(queries, keys, values, self.heads))
        tokens = enrich(tokens, aggregated)
        keys, values = self.broadcast_kv(tokens).chunk(2, dim=1)
        return self.broadcast_out(_attend(self.broadcast_q(x), keys, values, self.heads)), tokens


def enrich(tokens: Tensor, aggregated: Tensor) -> Tensor:
    """Weighted sum of carried global tokens and the aggregated image, position by position, (B, C, 7, 7) each.

    Attention would forget where a token came from; a sum does not.
    """
    return CARRIED * tokens + (1 - CARRIED) * aggregated


def _attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Multi-head attention between maps: queries (B, C, H, W), keys and values (B, C, h, w) to (B, C, H, W)."""
    batch, channels, height, width = queries.shape
    q, k, v = (part.reshape(batch, heads, channels // heads, -1) for part in (queries, keys, values))
    weights = (q.transpose(-2, -1) @ k * (channels // heads) ** -0.5).softmax(-1)
    attended: Tensor = v @ weights.transpose(-2, -1)
    return attended.reshape(batch, channels, height, width)


def _to_grid(x: Tensor) -> Tensor:
    """Resizes (B, C, h, w) to (B, C, 7, 7), bilinearly; nothing to do for a 224x224 image."""
    if x.shape[2:] == (GRID, GRID):
        return x
    rows, columns = (resizing_matrix(size, x) for size in x.shape[2:])
    return rows @ x @ columns.T


def resizing_matrix(size: int, like: Tensor) -> Tensor:
    """The (7, size) matrix of bilinear resizing with antialiasing: rows sum to one, positions are pixel centres."""
    scale = size / GRID
    targets, sources = (torch.arange(n, dtype=like.dtype, device=like.device) for n in (GRID, size))
    distances = ((targets + 0.5) * scale - 0.5)[:, None] - sources
    weights = (1 - distances.abs() / max(scale, 1.0)).relu()
    return weights / weights.sum(1, keepdim=True)


class TokenMlp(nn.Module):
    """The paper's "mix" MLP: mixes the 49 global tokens channel by channel, as in MLP-Mixer (arXiv 2105.01601)."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = TOKEN_MLP_RATIO * GRID**2
        self.norm = ChannelNorm(channels, dims=4)
        self.mlp = nn.Sequential(nn.Linear(GRID**2, hidden), nn.GELU(), nn.Linear(hidden, GRID**2))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.mlp(self.norm(tokens).flatten(2)).unflatten(-1, (GRID, GRID))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """MLP over channels, then LightViT's bi-dimensional attention, then the skip."""

    def __init__(self, channels: int, mlp_ratio: int):
        super().__init__()
        hidden = mlp_ratio * channels
        self.mlp = nn.Sequential(
            ChannelNorm(channels, dims=4),
            nn.Conv2d(channels, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, channels, 1),
        )
        self.attention = BidimensionalAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.mlp(x))  # type: ignore[no-any-return]


class BidimensionalAttention(nn.Module):
    """LightViT's gates: one per channel from the mean token, one per position from that token and the mean."""

    def __init__(self, channels: int):
        super().__init__()
        reduced = channels // GATE_REDUCTION
        self.norm = ChannelNorm(channels, dims=4)
        self.local_reduce = nn.Sequential(nn.Conv2d(channels, reduced, 1), nn.GELU())
        self.global_reduce = nn.Sequential(nn.Conv2d(channels, reduced, 1), nn.GELU())
        self.channel_gate = nn.Conv2d(reduced, channels, 1)
        # A linear layer on both features side by side is the sum of two.
        self.local_gate = nn.Conv2d(reduced, 1, 1)
        self.global_gate = nn.Conv2d(reduced, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        local, mean = self.local_reduce(normed), self.global_reduce(normed.mean((-2, -1), keepdim=True))
        position_gate = (self.local_gate(local) + self.global_gate(mean)).sigmoid()
        return x * self.channel_gate(mean).sigmoid() * position_gate  # type: ignore[no-any-return]


class Block(nn.Module):
    """Dual Token Block: local and global information are added, fed forward, and the global tokens handed on.

    Image tokens (B, C, H, W) and global tokens (B, C, 7, 7) in and out. After the `last` block of the network nothing
    reads the global tokens, so it has no MLP for them.
    """

    def __init__(self, channels: int, heads: int, mlp_ratio: int, steps: int, last: bool):
        super().__init__()
        self.encoder = ConvEncoder(channels)
        self.position_aware_tokens = PositionAwareTokens(channels, heads, steps)
        self.token_mlp = nn.Identity() if last else TokenMlp(channels)
        self.feed_forward = FeedForward(channels, mlp_ratio)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        local = self.encoder(x)
        broadcast, tokens = self.position_aware_tokens(local, tokens)
        return self.feed_forward(local + broadcast), self.token_mlp(tokens)


class Merge(nn.Module):
    """To the next stage: image tokens at half the height and width, both kinds of token at the new width."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.merge = nn.Sequential(ChannelNorm(in_channels, dims=4), nn.Conv2d(in_channels, out_channels, 2, 2))
        self.skip = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(in_channels, out_channels, 1))
        self.tokens = nn.Sequential(ChannelNorm(in_channels, dims=4), nn.Conv2d(in_channels, out_channels, 1))

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.merge(x) + self.skip(x), self.tokens(tokens)


def _conv_norm_act(in_channels: int, out_channels: int, stride: int, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.GELU())


class DualTokenViT(nn.Module):
    """Image (B, in_channels, H, W) to logits (B, num_classes), for H and W any multiples of 32.

    The stages' strides are 8, 16 and 32. There are 7x7 global tokens at any size, so that one set of weights serves
    all: what step-wise downsampling leaves of the image, (H / 32, W / 32), is resized to 7x7 where it is not.
    """

    def __init__(self, config: Config, num_classes: int, in_channels: int):
        super().__init__()
        first, half = config.channels[0], config.channels[0] // 2
        self.in_channels = in_channels
        self.stem = nn.Sequential(
            _conv_norm_act(in_channels, half, stride=2),
            _conv_norm_act(half, half, stride=1, groups=half),
            _conv_norm_act(half, half, stride=1, groups=half),
            _conv_norm_act(half, half, stride=2, groups=half),
            nn.Conv2d(half, first, 3, 2, 1),
            ChannelNorm(first, dims=4),
        )
        self.tokens = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, first, GRID, GRID), std=TOKEN_INIT_STD))
        final = (2, config.blocks[2] - 1)
        self.stages = nn.ModuleList(
            nn.ModuleList(
                Block(channels, config.heads[stage], config.mlp_ratios[stage], 2 - stage, (stage, index) == final)
                for index in range(config.blocks[stage])
            )
            for stage, channels in enumerate(config.channels)
        )
        self.merges = nn.ModuleList(map(Merge, config.channels[:-1], config.channels[1:]))
        self.norm = ChannelNorm(config.channels[-1], dims=4)
        self.head = linear_head(config.channels[-1], num_classes)

    def features(self, x: Tensor) -> list[Tensor]:
        """Feature maps of the three stages, (B, channels, H / stride, W / stride) each.

        Raises:
            InputError: not an image of multiples of 32 pixels.
        """
        check_image(x, self.in_channels)
        height, width = x.shape[2:]
        if height % STRIDES[-1] or width % STRIDES[-1]:
            raise InputError(f"DualToken-ViT takes heights and widths that are multiples of 32, got {height}x{width}")
        x, tokens = self.stem(x), self.tokens.expand(x.shape[0], -1, -1, -1)
        maps: list[Tensor] = []
        for stage, blocks in enumerate(self.stages):
            if stage:
                x, tokens = self.merges[stage - 1](x, tokens)
            for block in blocks.children():
                x, tokens = block(x, tokens)
            maps.append(x)
        return maps

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.norm(self.features(image)[-1]).mean((-2, -1)))  # type: ignore[no-any-return]


class DualTokenViTFeatures(DualTokenViT):
    """DualToken-ViT whose output is the list of its three feature maps; the unused head lets checkpoints load."""

    def forward(self, image: Tensor) -> list[Tensor]:  # type: ignore[override]
        return self.features(image)


def build(variant: str, *, num_classes: int = 1000, in_channels: int = 3, features_only: bool = False) -> nn.Module:
    """Builds `variant`: dualtoken_vit_tiny or dualtoken_vit_small, with new weights.

    The model maps an image (B, in_channels, H, W) to logits (B, num_classes), or with `features_only` to the list of
    the three stages' feature maps.

    Raises:
        UnknownNameError: there is no such variant.
    """
    if variant not in VARIANTS:
        raise UnknownNameError("DualToken-ViT variant", variant, VARIANTS)
    kind = DualTokenViTFeatures if features_only else DualTokenViT
    return kind(VARIANTS[variant], num_classes, in_channels)


def options_from_checkpoint(state_dict: Mapping[str, Tensor]) -> dict[str, object]:
    """Keyword arguments of `build` that a checkpoint implies: num_classes and in_channels.

    Raises:
        CheckpointError: the state dict is not a DualToken-ViT's.
    """
    try:
        head, stem = state_dict["head.weight"], state_dict["stem.0.0.weight"]
        state_dict["stages.0.0.position_aware_tokens.aggregate_qkv.weight"]
    except KeyError as missing:
        raise CheckpointError(f"not a DualToken-ViT checkpoint: it has no tensor {missing}") from None
    return {"num_classes": head.shape[0], "in_channels": stem.shape[1]}
