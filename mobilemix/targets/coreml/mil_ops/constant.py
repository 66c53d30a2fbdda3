"""Casts, filled tensors, quantisation and compressed weights."""

import torch
from torch import Tensor

from mobilemix.targets.coreml.mil_ops.base import DTypes, along, ints, like, named, rule

QUANTIZED = {"int8": (-128, 127), "uint8": (0, 255)}


@rule("cast", result=named("dtype"))
def cast(x: Tensor, dtype: str) -> Tensor:
    """To `dtype`; a fraction is cut off, anything but zero is true. The executor rounds fp16."""
    if dtype in ("fp16", "fp32", "fp64"):
        return x.float()
    return x.bool() if dtype == "bool" else x.long()


@rule("constexpr_cast", result=named("output_dtype"))
def constexpr_cast(source_val: Tensor, output_dtype: str) -> Tensor:
    """A stored constant of another type."""
    return cast(source_val, output_dtype)


@rule("fill", result=like("value", "fp32"))
def fill(shape: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """`value` everywhere."""
    return torch.as_tensor(value).expand(ints(shape))


@rule("fill_like", result=like("value", "fp32"))
def fill_like(ref_tensor: Tensor, value: Tensor | float = 0.0) -> Tensor:
    """`value` in the shape of `ref_tensor`."""
    return torch.as_tensor(value).expand(ref_tensor.shape)


@rule("range_1d")
def range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    """start, start + step … below end."""
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@rule("one_hot", result=like("on_value", "int32"))
def one_hot(
    indices: Tensor,
    one_hot_vector_size: Tensor,
    axis: Tensor | int = -1,
    on_value: Tensor | int = 1,
    off_value: Tensor | int = 0,
) -> Tensor:
    """on_value at each index along a new axis, off_value elsewhere."""
    hot = indices[..., None] == torch.arange(int(one_hot_vector_size))
    return torch.where(hot, torch.as_tensor(on_value), torch.as_tensor(off_value)).movedim(-1, int(axis))


@rule("quantize", result=named("output_dtype"))
def quantize(
    input: Tensor,  # noqa: A002 the parameter's name in MIL
    scale: Tensor,
    output_dtype: str,
    zero_point: Tensor | int = 0,
    axis: Tensor | None = None,
) -> Tensor:
    """clip(round(input / scale) + zero_point), ties to even."""
    low, high = QUANTIZED[output_dtype]
    offset = along(torch.as_tensor(zero_point), axis, input.ndim)
    return ((input / along(scale, axis, input.ndim)).round() + offset).clamp(low, high).long()


@rule("dequantize", result=like("scale"))
def dequantize(
    input: Tensor,  # noqa: A002
    scale: Tensor,
    zero_point: Tensor | int = 0,
    axis: Tensor | None = None,
) -> Tensor:
    """scale · (input − zero_point)."""
    offset = along(torch.as_tensor(zero_point), axis, input.ndim)
    return (input - offset) * along(scale, axis, input.ndim)


@rule("constexpr_affine_dequantize", result=like("scale"))
def constexpr_affine_dequantize(quantized_data: Tensor, zero_point: Tensor, scale: Tensor, axis: Tensor) -> Tensor:
    """iOS 16: scale · (data − zero_point), per tensor or along `axis`."""
    return dequantize(quantized_data, scale, zero_point, axis)


def _blockwise(values: Tensor, shape: torch.Size) -> Tensor:
    """`values` repeated along every axis until they have `shape`."""
    for axis, (size, target) in enumerate(zip(values.shape, shape, strict=True)):
        blocks, rest = divmod(target, size)
        if rest:
            raise ValueError(f"{size} blocks do not divide axis {axis} of {tuple(shape)}")
        values = values.repeat_interleave(blocks, axis) if size > 1 else values
    return values


@rule("constexpr_blockwise_shift_scale", result=like("scale"))
def constexpr_blockwise_shift_scale(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """iOS 18: scale · (data − offset), each of scale and offset over a block of data."""
    shifted = data if offset is None else data - _blockwise(offset, data.shape)
    return shifted * _blockwise(scale, data.shape)


def _bits(packed: Tensor, width: int, count: int) -> Tensor:
    """`count` numbers of `width` bits from bytes, the least significant bit first."""
    bits = (packed[:, None] >> torch.arange(8)) & 1
    used = bits.flatten()[: count * width].reshape(count, width)
    return (used << torch.arange(width)).sum(1)


@rule("constexpr_lut_to_dense", result=like("lut"))
def constexpr_lut_to_dense(
    indices: Tensor, lut: Tensor, shape: Tensor | None = None, vector_axis: Tensor | None = None
) -> Tensor:
    """Values looked up by index.

    iOS 16: packed indices of log₂(len(lut)) bits into one table, unfolded to `shape`. iOS 18: indices (*D) into tables
    (*G, palettes, vector), where each group of G covers a block of D and the vector unfolds along `vector_axis`.
    """
    if shape is not None:
        target = ints(shape)
        count = int(torch.tensor(target).prod())
        return lut[_bits(indices, (lut.numel() - 1).bit_length(), count)].reshape(target)
    palettes, vector = lut.shape[-2:]
    groups = torch.arange(lut.shape[:-2].numel()).reshape(lut.shape[:-2])
    rows = _blockwise(groups, indices.shape) * palettes + indices
    looked_up = lut.reshape(-1, vector)[rows]
    if vector == 1:
        return looked_up.squeeze(-1)
    if vector_axis is None:
        raise ValueError("a table of vectors needs vector_axis")
    axis = int(vector_axis) % indices.ndim
    return looked_up.movedim(-1, axis + 1).flatten(axis, axis + 1)


@rule("constexpr_sparse_to_dense", result=like("nonzero_data"))
def constexpr_sparse_to_dense(nonzero_data: Tensor, mask: Tensor, shape: Tensor | None = None) -> Tensor:
    """Values where the mask is set, else zero; iOS 16 packs the mask's bits, iOS 18 gives it its shape."""
    if shape is not None:
        target = ints(shape)
        mask = _bits(mask, 1, int(torch.tensor(target).prod())).reshape(target)
    dense = torch.zeros(mask.shape, dtype=nonzero_data.dtype)
    dense[mask.bool()] = nonzero_data
    return dense


def _lut_to_sparse_types(dtypes: DTypes, _: object) -> tuple[str, ...]:
    return dtypes["indices_mask"], dtypes["lut"]


@rule("constexpr_lut_to_sparse", result=_lut_to_sparse_types)
def constexpr_lut_to_sparse(
    indices_mask: Tensor, indices_nonzero_data: Tensor, lut: Tensor, vector_axis: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """iOS 18: the mask and the looked-up values of a sparse tensor of indices."""
    dense = constexpr_lut_to_dense(
        constexpr_sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis=vector_axis
    )
    mask = indices_mask
    if vector_axis is not None:
        mask = mask.repeat_interleave(lut.shape[-1], int(vector_axis))
    return mask, dense[mask.bool()]


def _shift_scale_types(dtypes: DTypes, _: object) -> tuple[str, ...]:
    return dtypes["data_mask"], dtypes["scale"]


@rule("constexpr_sparse_blockwise_shift_scale", result=_shift_scale_types)
def constexpr_sparse_blockwise_shift_scale(
    data_mask: Tensor, nonzero_data: Tensor, scale: Tensor, offset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """iOS 18: the mask and the dequantised values of a sparse tensor."""
    dense = constexpr_blockwise_shift_scale(constexpr_sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask.bool()]
