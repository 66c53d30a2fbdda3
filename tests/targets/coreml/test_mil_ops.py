"""Every rule against coremltools' own inference or against numpy and torch, through a package on disk."""

import functools
import inspect
import math
import types
from collections.abc import Callable

import coremltools as ct
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from coreml_mil_cases import Case, executed, inferred
from coremltools.converters.mil.mil import types as mil_types
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mobilemix.targets.coreml.mil_ops import RULES
from mobilemix.targets.coreml.mil_ops.convolution import avg_pool, max_pool
from mobilemix.targets.coreml.mil_ops.indexing import slice_by_index

GENERATOR = np.random.default_rng(0)
RULE_TOLERANCE = 1e-5


def noise(*shape: int) -> np.ndarray:
    return GENERATOR.standard_normal(shape).astype(np.float32)


def positive(*shape: int) -> np.ndarray:
    return GENERATOR.uniform(0.1, 2, shape).astype(np.float32)


def whole(low: int, high: int, *shape: int) -> np.ndarray:
    return GENERATOR.integers(low, high, shape).astype(np.int32)


def flags(*shape: int) -> np.ndarray:
    return GENERATOR.integers(0, 2, shape).astype(bool)


X = noise(2, 3, 4, 5)
Y = noise(3, 1, 5)
MAP = noise(2, 8, 6, 10)


def torch_of(function):
    """An oracle from a torch function of the inputs."""

    def oracle(**inputs):
        tensors = {
            name: [torch.from_numpy(each) for each in value] if isinstance(value, list) else torch.from_numpy(value)
            for name, value in inputs.items()
        }
        return function(**tensors)

    return oracle


def same_padded(x, window, stride, lower=False):
    """TensorFlow's SAME padding, spelled out."""
    pads = []
    for size, k, s in zip(x.shape[2:], window, stride, strict=True):
        total = max(0, (math.ceil(size / s) - 1) * s + k - size)
        small, large = total // 2, total - total // 2
        pads = [*((large, small) if lower else (small, large)), *pads]
    return F.pad(x, pads)


def unit_range(*shape: int) -> np.ndarray:
    return GENERATOR.uniform(-0.9, 0.9, shape).astype(np.float32)


UNARY = [
    "abs",
    "atan",
    "ceil",
    "cos",
    "cosh",
    "erf",
    "exp",
    "exp2",
    "floor",
    "identity",
    "relu",
    "relu6",
    "round",
    "sigmoid",
    "sign",
    "sin",
    "sinh",
    "softplus",
    "softsign",
    "square",
    "tan",
    "tanh",
]
ARITHMETIC = ["add", "sub", "mul", "real_div", "maximum", "minimum", "floor_div", "mod"]
ELEMENTWISE = [
    *[Case(name, {"x": X}) for name in UNARY],
    *[Case(name, {"x": unit_range(3, 4)}) for name in ("acos", "asin", "atanh")],
    Case("sqrt", {"x": positive(3, 4)}),
    Case("silu", {"x": X}, oracle=torch_of(lambda x: F.silu(x))),
    Case("logical_not", {"x": flags(3, 4)}),
    Case("softmax", {"x": X}),
    Case("softmax", {"x": X}, {"axis": 1}),
    *[Case(name, {"x": positive(2, 3)}) for name in ("log", "rsqrt", "inverse")],
    *[Case(name, {"x": positive(2, 3)}, {"epsilon": np.float32(0.25)}) for name in ("log", "rsqrt", "inverse")],
    *[Case("gelu", {"x": X}, {"mode": mode}) for mode in ("EXACT", "TANH_APPROXIMATION", "SIGMOID_APPROXIMATION")],
    Case("gelu", {"x": X}),
    Case("clip", {"x": X}, {"alpha": np.float32(-0.5), "beta": np.float32(0.7)}),
    Case("threshold", {"x": X}, {"alpha": np.float32(0.3)}),
    *[Case(name, {"x": X}, {"alpha": np.float32(0.3)}) for name in ("elu", "leaky_relu", "thresholded_relu")],
    Case("prelu", {"x": X}, {"alpha": np.float32([0.1, 0.2, -0.3])}),
    *[
        Case(name, {"x": X}, {"alpha": np.float32(0.3), "beta": np.float32(0.4)})
        for name in ("clamped_relu", "linear_activation", "scaled_tanh", "sigmoid_hard")
    ],
    Case("softplus_parametric", {"x": X}, {"alpha": positive(3), "beta": positive(3)}),
    *[Case(name, {"x": X, "y": Y}) for name in ARITHMETIC],
    Case("pow", {"x": positive(3, 4), "y": noise(3, 4)}),
    *[
        Case(name, {"x": whole(-9, 9, 3, 4), "y": whole(1, 5, 4)})
        for name in ["add", "sub", "mul", "maximum", "floor_div", "mod"]
    ],
    *[
        Case(name, {"x": whole(0, 3, 3, 4), "y": whole(0, 3, 4)})
        for name in ["equal", "not_equal", "greater", "greater_equal", "less", "less_equal"]
    ],
    *[Case(name, {"x": flags(3, 4), "y": flags(4)}) for name in ("logical_and", "logical_or", "logical_xor")],
    Case(
        "select",
        {"cond": flags(3, 4), "a": noise(3, 4), "b": noise(3, 4)},
        oracle=lambda cond, a, b: np.where(cond, a, b),
    ),
    Case("cast", {"x": noise(3, 4) * 5}, {"dtype": "int32"}),
    Case("cast", {"x": whole(-2, 2, 3, 4)}, {"dtype": "bool"}),
    Case("cast", {"x": flags(3, 4)}, {"dtype": "fp32"}),
    Case("cast", {"x": whole(-9, 9, 3, 4)}, {"dtype": "fp32"}),
]

REDUCTIONS = [
    *[
        Case(f"reduce_{name}", {"x": positive(2, 3, 4)}, parameters)
        for name in ["l1_norm", "l2_norm", "log_sum", "log_sum_exp", "max", "mean", "min", "prod", "sum", "sum_square"]
        for parameters in ({"axes": [1], "keep_dims": False}, {"axes": [0, -1], "keep_dims": True}, {})
    ],
    *[
        Case(f"reduce_{name}", {"x": X}, parameters)
        for name in ("argmax", "argmin")
        for parameters in ({}, {"axis": 1})
    ],
    Case("reduce_argmax", {"x": X}, {"axis": 2, "keep_dims": True}),
]

LINEAR = [
    Case("linear", {"x": noise(4, 6)}, {"weight": noise(3, 6), "bias": noise(3)}),
    Case("linear", {"x": noise(2, 4, 6)}, {"weight": noise(3, 6)}),
    Case("matmul", {"x": noise(2, 4, 6), "y": noise(6, 3)}),
    Case("matmul", {"x": noise(2, 6, 4), "y": noise(2, 3, 6)}, {"transpose_x": True, "transpose_y": True}),
    Case("matmul", {"x": noise(5, 1, 4, 6), "y": noise(2, 6, 3)}),
    Case("matmul", {"x": noise(6), "y": noise(6, 3)}),
    Case("einsum", {"values": [noise(2, 3, 4, 5), noise(2, 5, 4, 6)]}, {"equation": "nchw,nwhu->nchu"}),
    Case("einsum", {"values": [noise(3, 4, 5), noise(5, 1, 6)]}, {"equation": "chw,whr->chr"}),
]

NORMALIZATIONS = [
    Case(
        "batch_norm",
        {"x": X},
        {"mean": np.float32([0.1, 0.2, 0.3]), "variance": np.float32([1, 2, 3]), "gamma": np.float32([1, -2, 3])}
        | {"beta": np.float32([3, 2, 1]), "epsilon": np.float32(1e-3)},
        torch_of(
            lambda x: F.batch_norm(
                x, *map(torch.tensor, ([0.1, 0.2, 0.3], [1.0, 2, 3], [1.0, -2, 3], [3.0, 2, 1])), eps=1e-3
            )
        ),
    ),
    Case(
        "batch_norm",
        {"x": X},
        {"mean": np.zeros(3, np.float32), "variance": np.full(3, 1e-5, np.float32)},
        lambda x: x / np.sqrt(2e-5),
    ),
    Case("instance_norm", {"x": X}, {}, torch_of(lambda x: F.instance_norm(x))),
    Case(
        "instance_norm",
        {"x": X},
        {"gamma": np.float32([1, 2, 3]), "beta": np.float32([3, 2, 1]), "epsilon": np.float32(0.1)},
        torch_of(
            lambda x: F.instance_norm(x, weight=torch.tensor([1.0, 2, 3]), bias=torch.tensor([3.0, 2, 1]), eps=0.1)
        ),
    ),
    Case("layer_norm", {"x": X}, {"axes": [-1]}),
    Case("layer_norm", {"x": X}, {"axes": [1], "gamma": noise(3), "beta": noise(3), "epsilon": np.float32(0.1)}),
    Case("layer_norm", {"x": X}, {"axes": [2, 3], "gamma": noise(4, 5), "beta": noise(4, 5)}),
    Case("layer_norm", {"x": X}, {"axes": [0, 1, 2, 3]}),
    Case("l2_norm", {"x": X}),
    Case("l2_norm", {"x": noise(3, 4, 5)}, {"epsilon": np.float32(0.5)}),
    Case(
        "local_response_norm",
        {"x": MAP},
        {"size": 3, "alpha": np.float32(0.5)},
        torch_of(lambda x: F.local_response_norm(x, 3, alpha=0.5)),
    ),
]

K33 = noise(4, 8, 3, 3)
K23 = noise(4, 8, 2, 3)
DEPTHWISE = noise(8, 1, 3, 3)
TRANSPOSED = noise(8, 4, 3, 3)
BIAS = noise(4)


def pools(name, function):
    return [
        Case(
            name, {"x": MAP}, {"kernel_sizes": [2, 3], "pad_type": "valid"}, torch_of(lambda x: function(x, (2, 3), 1))
        ),
        Case(
            name,
            {"x": MAP},
            {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]},
            torch_of(lambda x: function(x, 3, 2, 1)),
        ),
        Case(
            name,
            {"x": MAP},
            {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1], "ceil_mode": True},
            torch_of(lambda x: function(x, 3, 2, 1, ceil_mode=True)),
        ),
        Case(
            name,
            {"x": MAP},
            {"kernel_sizes": [3, 4], "strides": [2, 3], "pad_type": "valid", "ceil_mode": True},
            torch_of(lambda x: function(x, (3, 4), (2, 3), ceil_mode=True)),
        ),
    ]


WINDOWS = [
    Case(
        "conv",
        {"x": MAP},
        {"weight": K33, "bias": BIAS},
        torch_of(lambda x: F.conv2d(x, torch.tensor(K33), torch.tensor(BIAS))),
    ),
    Case(
        "conv",
        {"x": MAP},
        {"weight": K33, "pad_type": "custom", "pad": [1, 2, 0, 3], "strides": [2, 1]},
        torch_of(lambda x: F.conv2d(F.pad(x, (0, 3, 1, 2)), torch.tensor(K33), stride=(2, 1))),
    ),
    Case(
        "conv",
        {"x": MAP},
        {"weight": DEPTHWISE, "pad_type": "custom", "pad": [2, 2, 2, 2], "dilations": [2, 2], "groups": 8},
        torch_of(lambda x: F.conv2d(x, torch.tensor(DEPTHWISE), padding=2, dilation=2, groups=8)),
    ),
    Case(
        "conv",
        {"x": MAP},
        {"weight": K23, "pad_type": "same", "strides": [1, 2]},
        torch_of(lambda x: F.conv2d(same_padded(x, (2, 3), (1, 2)), torch.tensor(K23), stride=(1, 2))),
    ),
    Case("conv", {"x": noise(2, 3, 9)}, {"weight": np.ones((1, 3, 1), np.float32)}, lambda x: x.sum(1, keepdims=True)),
    Case(
        "conv",
        {"x": noise(1, 3, 4, 5, 6)},
        {"weight": np.ones((1, 3, 1, 1, 1), np.float32)},
        lambda x: x.sum(1, keepdims=True),
    ),
    Case(
        "conv_transpose",
        {"x": MAP},
        {"weight": TRANSPOSED, "bias": BIAS, "strides": [2, 3], "pad_type": "custom", "pad": [1, 1, 2, 2]},
        torch_of(lambda x: F.conv_transpose2d(x, torch.tensor(TRANSPOSED), torch.tensor(BIAS), (2, 3), (1, 2))),
    ),
    Case(
        "conv_transpose",
        {"x": MAP},
        {"weight": TRANSPOSED, "bias": BIAS, "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]}
        | {"output_shape": [2, 4, 12, 20]},
        torch_of(lambda x: F.conv_transpose2d(x, torch.tensor(TRANSPOSED), torch.tensor(BIAS), 2, 1, 1)),
    ),
    Case(
        "conv_transpose",
        {"x": MAP},
        {"weight": DEPTHWISE, "groups": 8, "dilations": [2, 2], "strides": [2, 2]},
        torch_of(lambda x: F.conv_transpose2d(x, torch.tensor(DEPTHWISE), None, 2, groups=8, dilation=2)),
    ),
    Case(
        "conv_transpose",
        {"x": MAP},
        {"weight": TRANSPOSED, "strides": [2, 2], "pad_type": "same"},
        torch_of(lambda x: F.conv_transpose2d(x, torch.tensor(TRANSPOSED), None, 2)[..., :-1, :-1]),
    ),
    *pools("max_pool", F.max_pool2d),
    *pools("avg_pool", F.avg_pool2d),
    Case(
        "avg_pool",
        {"x": MAP},
        {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]}
        | {"exclude_padding_from_average": True},
        torch_of(lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)),
    ),
    Case(
        "avg_pool",
        {"x": MAP},
        {"kernel_sizes": [3, 3], "strides": [2, 2], "pad_type": "custom", "pad": [1, 1, 1, 1]}
        | {"exclude_padding_from_average": True, "ceil_mode": True},
        torch_of(lambda x: F.avg_pool2d(x, 3, 2, 1, True, False)),
    ),
    Case(
        "avg_pool",
        {"x": MAP},
        {"kernel_sizes": [2, 3], "strides": [1, 2], "pad_type": "same"},
        torch_of(lambda x: F.avg_pool2d(same_padded(x, (2, 3), (1, 2)), (2, 3), (1, 2))),
    ),
    Case(
        "avg_pool",
        {"x": noise(2, 3, 9)},
        {"kernel_sizes": [3], "pad_type": "valid"},
        torch_of(lambda x: F.avg_pool1d(x, 3, 1)),
    ),
    Case(
        "l2_pool",
        {"x": MAP},
        {"kernel_sizes": [3, 3], "pad_type": "valid"},
        torch_of(lambda x: F.lp_pool2d(x, 2, 3, 1)),
    ),
]

SHAPES = [
    Case("reshape", {"x": X}, {"shape": [6, -1]}),
    Case("reshape", {"x": X}, {"shape": [0, 1, 12, 0]}),
    Case("expand_dims", {"x": Y}, {"axes": [0, -1]}),
    Case("squeeze", {"x": Y}, {"axes": [1]}),
    Case("squeeze", {"x": Y}),
    Case("flatten2d", {"x": X}, {"axis": 2}),
    Case("flatten2d", {"x": X}, {"axis": -1}),
    Case("transpose", {"x": X}, {"perm": [2, 0, -1, 1]}),
    Case("shape", {"x": X}),
    Case("concat", {"values": [noise(2, 3), noise(2, 3)]}, {"axis": 1}),
    Case("concat", {"values": [noise(2, 3), noise(4, 3)]}, {"axis": -2}),
    Case(
        "concat",
        {"values": [noise(3, 2), noise(3, 2)]},
        {"axis": 0, "interleave": True},
        lambda values: np.stack(values, 1).reshape(6, 2),
    ),
    Case("concat", {"values": [np.float32([1])]}, {"axis": 0}),
    Case("stack", {"values": [noise(2, 3), noise(2, 3)]}, {"axis": 1}),
    Case("stack", {"values": [noise(2, 3), noise(2, 3)]}, {"axis": -1}),
    Case("split", {"x": X}, {"num_splits": 2, "axis": 2}),
    Case("split", {"x": X}, {"split_sizes": [1, 2], "axis": 1}),
    Case("tile", {"x": Y}, {"reps": [1, 2, 3]}),
    Case("reverse", {"x": X}, {"axes": [1, -1]}),
    Case("reverse", {"x": Y}),
    Case(
        "reverse_sequence",
        {"x": noise(2, 4)},
        {"lengths": [3, 2], "seq_axis": 1, "batch_axis": 0},
        lambda x: np.stack([x[0, [2, 1, 0, 3]], x[1, [1, 0, 2, 3]]]),
    ),
    Case("pad", {"x": X}, {"pad": [1, 2, 0, 3], "constant_val": np.float32(7)}),
    Case("pad", {"x": X}, {"pad": [1, 2, 0, 3], "mode": "reflect"}),
    Case(
        "pad",
        {"x": X},
        {"pad": [1, 0, 1, 2, 0, 4, 2, 1], "mode": "replicate"},
        lambda x: np.pad(x, [(1, 0), (1, 2), (0, 4), (2, 1)], "edge"),
    ),
    Case("crop", {"x": X}, {"crop_height": [1, 2], "crop_width": [0, 1]}, lambda x: x[..., 1:2, 0:4]),
    Case(
        "sliding_windows",
        {"x": noise(2, 7, 3)},
        {"axis": 1, "size": 3, "stride": 2},
        lambda x: np.stack([x[:, i : i + 3] for i in (0, 2, 4)], 1),
    ),
    Case("pixel_shuffle", {"x": MAP}, {"upscale_factor": 2}, torch_of(lambda x: F.pixel_shuffle(x, 2))),
    Case(
        "depth_to_space",
        {"x": MAP},
        {"block_size": 2},
        lambda x: _depth_to_space(x, 2),
    ),
    Case("space_to_depth", {"x": MAP}, {"block_size": 2}, lambda x: _space_to_depth(x, 2)),
    Case(
        "space_to_batch",
        {"x": noise(1, 2, 3, 4)},
        {"block_shape": [2, 2], "paddings": [[1, 0], [0, 0]]},
        lambda x: np.concatenate(
            [np.pad(x, [(0, 0), (0, 0), (1, 0), (0, 0)])[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        ),
    ),
]


def _space_to_depth(x, b):
    return np.concatenate([x[:, :, i::b, j::b] for i in range(b) for j in range(b)], 1)


def _depth_to_space(x, b):
    n, c, h, w = x.shape
    result = np.empty((n, c // b**2, h * b, w * b), x.dtype)
    for i in range(b):
        for j in range(b):
            block = i * b + j
            result[:, :, i::b, j::b] = x[:, block * c // b**2 : (block + 1) * c // b**2]
    return result


INDICES = whole(-3, 3, 2, 2)
INDEXING = [
    Case("slice_by_index", {"x": X}, {"begin": [0, 1, 1, 0], "end": [2, 3, 4, 5], "stride": [1, 1, 2, 3]}),
    Case(
        "slice_by_index",
        {"x": X},
        {"begin": [0, -2, 1, 0], "end": [1, -1, 0, 2], "end_mask": [True, False, True, False]},
    ),
    Case(
        "slice_by_index",
        {"x": X},
        {"begin": [1, 0, 0, 0], "end": [0, 2, 0, 3], "begin_mask": [False, True, False, True]}
        | {"squeeze_mask": [True, False, False, False], "end_mask": [False, False, True, False]},
    ),
    Case(
        "slice_by_index",
        {"x": X},
        {"begin": [0, 2, 0, 0], "end": [2, 0, 0, 0], "stride": [1, -1, 1, -2]}
        | {"begin_mask": [False, False, True, True], "end_mask": [False, False, True, True]},
    ),
    Case("slice_by_size", {"x": X}, {"begin": [0, -2, 1, 0], "size": [1, 2, -1, 3]}, lambda x: x[:1, -2:, 1:, :3]),
    Case("gather", {"x": X, "indices": INDICES}, {"axis": 1}),
    Case("gather", {"x": X, "indices": np.int32([1, 0])}),
    Case("gather_along_axis", {"x": noise(3, 4), "indices": whole(-3, 3, 2, 4)}),
    Case("gather_along_axis", {"x": noise(3, 4), "indices": whole(0, 4, 3, 2)}, {"axis": 1}),
    Case(
        "gather_nd",
        {"x": X, "indices": np.int32([[0, 1], [1, -1]])},
        {},
        lambda x, indices: np.stack([x[tuple(row)] for row in indices]),
    ),
    Case(
        "scatter",
        {"data": noise(4, 3), "indices": np.int32([1, 1]), "updates": noise(2, 3)},
        {"axis": 0, "mode": "add"},
        lambda data, indices, updates: (
            data + np.stack([0 * updates[0], updates.sum(0), 0 * updates[0], 0 * updates[0]])
        ),
    ),
    Case(
        "scatter",
        {"data": noise(4, 3), "indices": np.int32([2]), "updates": noise(4, 1)},
        {"axis": 1, "mode": "update"},
        lambda data, indices, updates: np.concatenate([data[:, :2], updates], 1),
    ),
    Case(
        "scatter_along_axis",
        {"data": noise(3, 4), "indices": np.int32([[0, 1, 2, 0]]), "updates": noise(1, 4)},
        {"axis": 0, "mode": "update"},
    ),
    Case(
        "scatter_nd",
        {"data": noise(3, 4), "indices": np.int32([[0, 1], [2, 3]]), "updates": noise(2)},
        {"mode": "mul"},
        lambda data, indices, updates: data * np.array([[1, updates[0], 1, 1], [1, 1, 1, 1], [1, 1, 1, updates[1]]]),
    ),
    *[
        Case(
            "scatter_nd",
            {"data": noise(3, 2), "indices": np.int32([[1]]), "updates": noise(1, 2)},
            {"mode": mode},
            lambda data, indices, updates, combine=combine: np.stack([data[0], combine(data[1], updates[0]), data[2]]),
        )
        for mode, combine in [("sub", np.subtract), ("div", np.divide), ("max", np.maximum), ("min", np.minimum)]
    ],
    Case("argsort", {"x": X}, {"axis": 1}),
    Case("argsort", {"x": X}, {"ascending": True}),
    Case("topk", {"x": X}, {"k": 2, "axis": -1}),
    Case("topk", {"x": X}, {"k": 2, "axis": 1, "ascending": True}),
    Case("cumsum", {"x": X}, {"axis": 1}),
    Case("cumsum", {"x": X}, {"axis": 2, "reverse": True}),
    Case(
        "cumsum",
        {"x": noise(2, 3)},
        {"axis": 1, "exclusive": True},
        lambda x: np.concatenate([0 * x[:, :1], x.cumsum(1)[:, :-1]], 1),
    ),
    Case(
        "cumsum",
        {"x": noise(2, 3)},
        {"axis": 1, "exclusive": True, "reverse": True},
        lambda x: np.concatenate([x[:, ::-1].cumsum(1)[:, ::-1][:, 1:], 0 * x[:, :1]], 1),
    ),
    Case("band_part", {"x": noise(2, 4, 5)}, {"lower": 1, "upper": 2}),
    Case("band_part", {"x": noise(4, 5)}, {"lower": -1, "upper": 0}),
    Case("non_zero", {"x": whole(0, 2, 3, 4)}),
]

CONSTANTS = [
    Case("range_1d", {"start": np.int32(1)}, {"end": 9, "step": 3}, lambda start: np.arange(1, 9, 3)),
    Case("one_hot", {"indices": np.int32([0, 2])}, {"one_hot_vector_size": 3}, lambda indices: np.eye(3)[indices]),
    Case(
        "one_hot",
        {"indices": np.int32([0, 2])},
        {"one_hot_vector_size": 3, "axis": 0, "on_value": np.float32(5), "off_value": np.float32(-1)},
        lambda indices: np.where(np.eye(3)[indices].T == 1, 5.0, -1.0),
    ),
    Case("fill", {"shape": np.int32([2, 3])}, {"value": np.float32(0.5)}),
]

GRID = noise(2, 3, 5, 7)


def interpolate(**options):
    return torch_of(lambda x: F.interpolate(x, **options))


def sampled(mode, target):
    """Linear interpolation at the grid points that the operator's documentation lists for two input values."""
    points = {
        ("UNALIGN_CORNERS", 5): [0, 0.1, 0.5, 0.9, 1],
        ("STRICT_ALIGN_CORNERS", 5): [0, 0.25, 0.5, 0.75, 1],
        ("ALIGN_CORNERS", 5): [0, 0.25, 0.5, 0.75, 1],
        ("ALIGN_CORNERS", 1): [0.5],
        ("DEFAULT", 5): [0, 0.4, 0.8, 1, 1],
        ("OFFSET_CORNERS", 5): [0.1, 0.3, 0.5, 0.7, 0.9],
    }[mode, target]
    return lambda x: x[..., :1] * (1 - np.array(points)) + x[..., 1:] * np.array(points)


IMAGES = [
    Case(
        "upsample_bilinear",
        {"x": GRID},
        {"scale_factor_height": np.float32(2), "scale_factor_width": np.float32(3), "align_corners": False},
        interpolate(scale_factor=(2, 3), mode="bilinear", align_corners=False),
    ),
    Case(
        "upsample_bilinear",
        {"x": GRID},
        {"scale_factor_height": 2, "scale_factor_width": 2},
        interpolate(scale_factor=2, mode="bilinear", align_corners=True),
    ),
    Case(
        "upsample_bilinear",
        {"x": GRID},
        {"scale_factor_height": np.float32(1.5), "scale_factor_width": np.float32(2.5), "align_corners": False},
        interpolate(scale_factor=(1.5, 2.5), mode="bilinear", align_corners=False, recompute_scale_factor=True),
    ),
    *[
        Case(
            "resize_bilinear",
            {"x": noise(2, 1, 1, 2)},
            {"target_size_height": 1, "target_size_width": target, "sampling_mode": mode},
            sampled(mode, target),
        )
        for mode, target in [
            ("UNALIGN_CORNERS", 5),
            ("STRICT_ALIGN_CORNERS", 5),
            ("ALIGN_CORNERS", 5),
            ("ALIGN_CORNERS", 1),
            ("DEFAULT", 5),
            ("OFFSET_CORNERS", 5),
        ]
    ],
    Case(
        "upsample_nearest_neighbor",
        {"x": GRID},
        {"scale_factor_height": 2, "scale_factor_width": 3},
        lambda x: x.repeat(2, -2).repeat(3, -1),
    ),
    Case(
        "resize_nearest_neighbor",
        {"x": GRID},
        {"target_size_height": 8, "target_size_width": 3},
        interpolate(size=(8, 3), mode="nearest"),
    ),
    *[
        Case(
            "resample",
            {"x": GRID, "coordinates": GENERATOR.uniform(-1.2, 1.2, (2, 4, 3, 2)).astype(np.float32)},
            {"sampling_mode": "bilinear", "padding_mode": padding, "padding_value": np.float32(0)}
            | {"coordinates_mode": "normalized_minus_one_to_one", "align_corners": aligned},
            torch_of(
                lambda x, coordinates, expected=expected, aligned=aligned: F.grid_sample(
                    x, coordinates, "bilinear", expected, aligned
                )
            ),
        )
        for padding, expected, aligned in [
            ("constant", "zeros", True),
            ("border", "border", False),
            ("reflection", "reflection", True),
            ("symmetric", "reflection", False),
        ]
    ],
    Case(
        "resample",
        {"x": GRID, "coordinates": GENERATOR.uniform(0, 4, (2, 3, 3, 2)).astype(np.float32)},
        {"sampling_mode": "bilinear", "padding_mode": "constant", "padding_value": np.float32(0.5)}
        | {"coordinates_mode": "unnormalized", "align_corners": True},
        torch_of(
            lambda x, coordinates: F.grid_sample(
                x, coordinates / torch.tensor([6.0, 4.0]) * 2 - 1, "bilinear", "zeros", True
            )
        ),
    ),
]

IOS15 = ELEMENTWISE + REDUCTIONS + LINEAR + NORMALIZATIONS + WINDOWS + SHAPES + INDEXING + CONSTANTS + IMAGES
IOS16 = [
    Case(
        "conv",
        {"x": MAP},
        {"weight": K23, "pad_type": "same_lower", "strides": [1, 2]},
        torch_of(lambda x: F.conv2d(same_padded(x, (2, 3), (1, 2), lower=True), torch.tensor(K23), stride=(1, 2))),
    ),
    Case(
        "max_pool",
        {"x": positive(1, 2, 6, 6)},
        {"kernel_sizes": [2, 2], "pad_type": "same_lower"},
        torch_of(lambda x: F.max_pool2d(same_padded(x, (2, 2), (1, 1), lower=True), 2, 1)),
    ),
    Case("fill_like", {"ref_tensor": X}, {"value": np.int32(3)}),
    Case("gather", {"x": noise(2, 3, 4), "indices": whole(0, 4, 2, 5)}, {"axis": 2, "batch_dims": 1}),
    Case("gather", {"x": noise(2, 3, 4), "indices": whole(0, 4, 2, 3, 2)}, {"axis": 2, "batch_dims": 2}),
    Case(
        "gather_nd",
        {"x": noise(2, 3, 4), "indices": whole(0, 3, 2, 5, 1)},
        {"batch_dims": 1},
        lambda x, indices: np.stack([x[i, indices[i, :, 0]] for i in range(2)]),
    ),
    Case(
        "pixel_unshuffle",
        {"x": MAP},
        {"downscale_factor": np.uint32(2)},
        torch_of(lambda x: F.pixel_unshuffle(x, 2)),
    ),
    Case(
        "reshape_like",
        {"x": noise(2, 3, 10), "ref_tensors": [noise(2, 3, 4), noise(1, 5, 2)]},
        {"begins": [0, 1], "ends": [2, 0], "end_masks": [False, True]},
        lambda x, ref_tensors: x.reshape(2, 3, 5, 2),
    ),
    Case("topk", {"x": X}, {"k": 2, "return_indices": False}),
    Case(
        "upsample_bilinear",
        {"x": noise(1, 1, 1, 2)},
        {"scale_factor_height": np.float32(1), "scale_factor_width": np.float32(2.5), "align_corners": False}
        | {"half_pixel_centers": False},
        sampled("DEFAULT", 5),
    ),
]
IOS17 = [
    Case("topk", {"x": X}, {"k": 2, "output_indices_dtype": "uint16"}),
    Case("reduce_argmax", {"x": X}, {"output_dtype": "uint16"}),
    Case("reshape", {"x": X}, {"shape": [2, 1, 12, 0]}),
    Case("expand_dims", {"x": X}, {"axes": [2]}),
    Case(
        "resize",
        {"x": GRID},
        {"shape": np.int32([10, 0]), "resized_dims": np.uint32(2), "sampling_mode": "UNALIGN_CORNERS"},
        interpolate(size=(10, 7), mode="bilinear", align_corners=False),
    ),
    Case(
        "resize",
        {"x": GRID},
        {"shape": np.int32([8, 3]), "resized_dims": np.uint32(2), "interpolation_mode": "NEAREST_NEIGHBOR"},
        interpolate(size=(8, 3), mode="nearest"),
    ),
    Case(
        "quantize",
        {"input": noise(3, 4)},
        {"scale": np.float32(0.02), "zero_point": np.int8(5), "output_dtype": "int8"},
    ),
    Case(
        "quantize",
        {"input": positive(3, 4)},
        {"scale": np.float32([0.02, 0.1, 0.3]), "zero_point": np.uint8([1, 2, 3]), "axis": 0, "output_dtype": "uint8"},
    ),
    Case("quantize", {"input": noise(3, 4)}, {"scale": np.float32(0.02), "output_dtype": "int8"}),
    Case(
        "dequantize",
        {"input": whole(-128, 128, 3, 4).astype(np.int8)},
        {"scale": np.float32([0.5, 1, 2]), "zero_point": np.int8([1, 2, 3]), "axis": 0},
        lambda **given: (given["input"] - np.float32([[1], [2], [3]])) * np.float32([[0.5], [1], [2]]),
    ),
    Case(
        "dequantize", {"input": np.uint8([0, 9, 255])}, {"scale": np.float32(0.5)}, lambda **given: given["input"] * 0.5
    ),
]
IOS18 = [
    Case(
        "scaled_dot_product_attention",
        {"query": noise(2, 3, 4, 8), "key": noise(2, 3, 5, 8), "value": noise(2, 3, 5, 6)},
    ),
    Case(
        "scaled_dot_product_attention",
        {"query": noise(2, 4, 8), "key": noise(2, 5, 8), "value": noise(2, 5, 6), "attn_mask": noise(4, 5)},
    ),
    Case(
        "scaled_dot_product_attention",
        {"query": noise(2, 2, 8), "key": noise(2, 3, 8), "value": noise(2, 3, 6)}
        | {"attn_mask": np.array([[True, False, True], [True, True, False]])},
    ),
    Case(
        "slice_update",
        {"x": X, "update": noise(2, 2, 4, 2)},
        {"begin": [0, 1, 0, 0], "end": [2, 3, 0, 3], "stride": [1, 1, 1, 2], "end_mask": [False, False, True, False]},
    ),
]
OPSETS = {ct.target.iOS15: IOS15, ct.target.iOS16: IOS16, ct.target.iOS17: IOS17, ct.target.iOS18: IOS18}


ELSEWHERE = {"batch_to_space", "classify"} | {name for name in RULES if name.startswith("constexpr_")}
"""Rules that test_executor.py runs, or the tests below."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[ct.target], list[list[np.ndarray]]]:
    return functools.cache(lambda opset: executed(OPSETS[opset], opset, tmp_path_factory.mktemp("packages")))


@pytest.mark.parametrize(
    ("opset", "index"),
    [pytest.param(o, i, id=f"{o.name}-{i}-{c.label}") for o, cases in OPSETS.items() for i, c in enumerate(cases)],
)
def test_rule(results, opset: ct.target, index: int) -> None:
    case, actual = OPSETS[opset][index], results(opset)[index]
    expected = inferred(case, opset) if case.oracle is None else case.oracle(**case.inputs)
    expected = list(expected) if isinstance(expected, list | tuple) else [expected]
    assert len(actual) == len(expected)
    for computed, reference in zip(actual, expected, strict=True):
        assert computed.shape == np.shape(reference)
        np.testing.assert_allclose(computed, reference, rtol=RULE_TOLERANCE, atol=RULE_TOLERANCE)


def test_every_rule_has_a_case() -> None:
    assert set(RULES) == {case.type for cases in OPSETS.values() for case in cases} | ELSEWHERE


def definitions(name: str) -> set[type]:
    return set(SSAOpRegistry.core_ops[name].values())


@pytest.mark.parametrize("name", sorted(RULES))
def test_parameters_are_those_of_the_operation(name: str) -> None:
    parameters = inspect.signature(RULES[name].compute).parameters
    specified = [definition.input_spec.input_types for definition in definitions(name)]
    assert set(parameters) == set().union(*specified)
    for key, parameter in parameters.items():
        optional = all(key not in each or each[key].optional for each in specified)
        absent_somewhere = any(key not in each for each in specified)
        if parameter.default is inspect.Parameter.empty:
            assert not absent_somewhere
        else:
            assert optional or absent_somewhere


@pytest.mark.parametrize("name", sorted(RULES))
def test_defaults_are_those_of_the_operation(name: str) -> None:
    parameters = inspect.signature(RULES[name].compute).parameters
    for definition in definitions(name):
        operation = definition.__new__(definition)
        shapes = types.SimpleNamespace(rank=4, shape=(2, 2, 2, 2), dtype=mil_types.fp32)
        vars(operation).update(dict.fromkeys(definition.input_spec.input_types, shapes), return_indices=None)
        for key, default in vars(operation.default_inputs())["_default_inputs"]:
            ours = parameters[key].default
            assert ours is not inspect.Parameter.empty
            if np.ndim(default) == 0 and ours is not None:
                assert ours == default


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pad=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    ceil=st.booleans(),
    exclude=st.booleans(),
)
def test_pools_are_those_of_torch(size, kernel, stride, pad, ceil, exclude) -> None:
    assume(all(p <= k // 2 for p, k in zip(pad, kernel, strict=True)))
    # Without padding torch also drops a last window that would begin past the end; MIL's formula has no such window
    # as long as no stride exceeds its kernel.
    assume(all(s <= k for s, k in zip(stride, kernel, strict=True)))
    x = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(0))
    window = torch.tensor(kernel), "custom", torch.tensor(stride), torch.tensor(pad).repeat_interleave(2)
    expected = F.avg_pool2d(x, kernel, stride, pad, ceil, count_include_pad=not exclude)
    torch.testing.assert_close(avg_pool(x, *window, torch.tensor(exclude), torch.tensor(ceil)), expected)
    torch.testing.assert_close(max_pool(x, *window, torch.tensor(ceil)), F.max_pool2d(x, kernel, stride, pad, 1, ceil))


@settings(deadline=None, max_examples=60)
@given(data=st.data(), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_slices_are_those_of_numpy(data, shape) -> None:
    x = np.arange(np.prod(shape)).reshape(shape)
    rank = len(shape)
    begin, end = (data.draw(st.lists(st.integers(-5, 5), min_size=rank, max_size=rank)) for _ in range(2))
    stride = data.draw(st.lists(st.sampled_from([-2, -1, 1, 2]), min_size=rank, max_size=rank))
    masks = [data.draw(st.lists(st.booleans(), min_size=rank, max_size=rank)) for _ in range(2)]
    index = tuple(
        slice(None if no_first else first, None if no_last else last, step)
        for first, last, step, no_first, no_last in zip(begin, end, stride, *masks, strict=True)
    )
    result = slice_by_index(torch.from_numpy(x), *map(torch.tensor, (begin, end, stride, *masks)))
    np.testing.assert_array_equal(result.numpy(), x[index])


def test_batch_to_space_undoes_space_to_batch() -> None:
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    block, margins = torch.tensor([3, 2]), torch.tensor([[1, 1], [2, 0]])
    batches = RULES["space_to_batch"].compute(x, block, margins)
    assert batches.shape == (12, 3, 2, 4)
    torch.testing.assert_close(RULES["batch_to_space"].compute(batches, block, margins), x)


def test_topk_of_minus_one_takes_all() -> None:
    values, indices = RULES["topk"].compute(torch.tensor([[3.0, 5.0, 4.0]]), torch.tensor(-1))
    assert values.tolist() == [[5, 4, 3]]
    assert indices.tolist() == [[1, 2, 0]]


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("gather", {"x": torch.zeros(3), "indices": torch.tensor([3])}, "3 to 3 for 3"),
        ("split", {"x": torch.zeros(3), "axis": torch.tensor(0), "num_splits": torch.tensor(2)}, "does not divide"),
        ("split", {"x": torch.zeros(3), "axis": torch.tensor(0)}, "neither"),
        ("pad", {"x": torch.zeros(3), "pad": torch.tensor([3, 0]), "mode": "reflect"}, "cannot reflect 3 of 3"),
        ("pad", {"x": torch.zeros(3), "pad": torch.tensor([3, 0]), "mode": "wrap"}, "unknown mode 'wrap'"),
        ("gelu", {"x": torch.zeros(3), "mode": "FAST"}, "unknown mode 'FAST'"),
        ("conv", {"x": torch.zeros(1, 1, 3), "weight": torch.zeros(1, 1, 3), "pad_type": "full"}, "unknown pad_type"),
        ("resize_bilinear", {"x": torch.zeros(1, 3, 3), "sampling_mode": "CUBIC"}, "unknown sampling mode"),
    ],
)
def test_undefined_requests_are_refused(name: str, inputs: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        RULES[name].compute(**inputs)
