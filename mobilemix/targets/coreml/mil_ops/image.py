"""Resizing and sampling of the last two axes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mobilemix.targets.coreml.mil_ops.base import ints, rule


def grid(size: int, target: int, mode: str) -> Tensor:
    """Where along `size` values each of `target` samples lies: the definitions of MIL's resize_bilinear."""
    i = torch.arange(target, dtype=torch.float64)
    match mode:
        case "ALIGN_CORNERS" if target == 1:
            points = (size - 1) / 2 + i
        case "STRICT_ALIGN_CORNERS" | "ALIGN_CORNERS":
            points = i * ((size - 1) / max(target - 1, 1))
        case "DEFAULT":
            points = i * (size / target)
        case "OFFSET_CORNERS":
            points = (i + 0.5) * (max(1, size - 1) / target)
        case "UNALIGN_CORNERS":
            points = (i + 0.5) * (size / target) - 0.5
        case _:
            raise ValueError(f"unknown sampling mode '{mode}'")
    return points.clamp(0, size - 1)


def interpolation(size: int, target: int, mode: str) -> Tensor:
    """The (target, size) matrix of linear interpolation."""
    points = grid(size, target, mode)
    left = points.floor().clamp(max=max(size - 2, 0)).long()
    share = points - left
    matrix = torch.zeros(target, size, dtype=torch.float64)
    rows = torch.arange(target)
    matrix[rows, left] = 1 - share
    matrix[rows, (left + 1).clamp(max=size - 1)] += share
    return matrix.float()


def bilinear(x: Tensor, height: int, width: int, mode: str) -> Tensor:
    """(*D, H, W) to (*D, height, width)."""
    rows, columns = interpolation(x.shape[-2], height, mode), interpolation(x.shape[-1], width, mode)
    return rows @ x @ columns.mT


def nearest(x: Tensor, height: int, width: int) -> Tensor:
    """Sample i of each axis is value ⌊i · size / target⌋."""
    rows = torch.arange(height) * x.shape[-2] // height
    columns = torch.arange(width) * x.shape[-1] // width
    return x[..., rows[:, None], columns]


def _scaled(size: int, factor: Tensor | float) -> int:
    return math.floor(size * float(factor))


@rule("upsample_bilinear")
def upsample_bilinear(
    x: Tensor,
    scale_factor_height: Tensor | float = 1.0,
    scale_factor_width: Tensor | float = 1.0,
    align_corners: Tensor | bool = True,
    half_pixel_centers: Tensor | bool | None = None,
) -> Tensor:
    """Bilinear, with the scale that the output size implies."""
    half = not align_corners if half_pixel_centers is None else bool(half_pixel_centers)
    if align_corners and half:
        raise ValueError("align_corners and half_pixel_centers exclude each other")
    mode = "STRICT_ALIGN_CORNERS" if align_corners else "UNALIGN_CORNERS" if half else "DEFAULT"
    height, width = _scaled(x.shape[-2], scale_factor_height), _scaled(x.shape[-1], scale_factor_width)
    return bilinear(x, height, width, mode)


@rule("resize_bilinear")
def resize_bilinear(
    x: Tensor,
    target_size_height: Tensor | int = 1,
    target_size_width: Tensor | int = 1,
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """Bilinear, to a given size."""
    return bilinear(x, int(target_size_height), int(target_size_width), sampling_mode)


@rule("upsample_nearest_neighbor")
def upsample_nearest_neighbor(
    x: Tensor, scale_factor_height: Tensor | float = 1.0, scale_factor_width: Tensor | float = 1.0
) -> Tensor:
    """Nearest neighbour, by factors."""
    return nearest(x, _scaled(x.shape[-2], scale_factor_height), _scaled(x.shape[-1], scale_factor_width))


@rule("resize_nearest_neighbor")
def resize_nearest_neighbor(x: Tensor, target_size_height: Tensor, target_size_width: Tensor) -> Tensor:
    """Nearest neighbour, to a given size."""
    return nearest(x, int(target_size_height), int(target_size_width))


@rule("resize")
def resize(
    x: Tensor,
    shape: Tensor,
    resized_dims: Tensor,
    interpolation_mode: str = "LINEAR",
    sampling_mode: str = "DEFAULT",
) -> Tensor:
    """The last `resized_dims` axes to the last sizes of `shape`, where 0 keeps the size."""
    axes = range(x.ndim - int(resized_dims), x.ndim)
    for axis, size in zip(axes, ints(shape)[-int(resized_dims) :], strict=True):
        target = size or x.shape[axis]
        if interpolation_mode == "LINEAR":
            matrix = interpolation(x.shape[axis], target, sampling_mode)
            x = (x.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)
        elif interpolation_mode == "NEAREST_NEIGHBOR" and sampling_mode == "DEFAULT":
            x = x.index_select(axis, torch.arange(target) * x.shape[axis] // target)
        else:
            raise ValueError(f"{interpolation_mode} with {sampling_mode} has no documented rounding")
    return x


PADDING = {"constant": "zeros", "border": "border", "reflection": "reflection", "symmetric": "reflection"}


@rule("resample")
def resample(
    x: Tensor,
    coordinates: Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Tensor,
    coordinates_mode: str,
    align_corners: Tensor,
) -> Tensor:
    """x (B, C, H, W) at `coordinates` (B, H', W', 2), given as (x, y)."""
    at = coordinates.float()
    aligned = bool(align_corners)
    match coordinates_mode:
        case "unnormalized":
            at, aligned = at / torch.tensor([x.shape[-1] - 1, x.shape[-2] - 1]) * 2 - 1, True
        case "normalized_zero_to_one":
            at = at * 2 - 1
        case "normalized_minus_one_to_one":
            pass
        case _:
            raise ValueError(f"unknown coordinates_mode '{coordinates_mode}'")
    if padding_mode == "constant":
        sampled = F.grid_sample(x - padding_value, at, sampling_mode, "zeros", aligned)
        return sampled + padding_value
    if (
        padding_mode == "border"
        or (padding_mode == "reflection" and aligned)
        or (padding_mode == "symmetric" and not aligned)
    ):
        return F.grid_sample(x, at, sampling_mode, PADDING[padding_mode], aligned)
    raise ValueError(f"padding_mode '{padding_mode}' with align_corners={aligned} is not implemented")
