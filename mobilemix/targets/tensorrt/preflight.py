"""What NVIDIA's parser takes, by its own list, held against an ONNX file with nothing installed.

The list is that of the oldest parser that is supported, because what it takes newer ones take too: onnx-tensorrt,
docs/operators.md, release 10.0. Conditions that shapes and constants of an exported program always meet are left out.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

from mobilemix.targets.onnx.runtime import read_model
from mobilemix.targets.tensorrt.builder import Refusal

LACKS = frozenset(
    {
        *("AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"),
        *("BlackmanWindow", "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "DFT", "Det"),
        *("DynamicQuantizeLinear", "HammingWindow", "HannWindow", "ImageDecoder", "MatMulInteger", "MaxRoiPool"),
        *("MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional"),
        *("OptionalGetElement", "OptionalHasElement", "QLinearConv", "QLinearMatMul", "RegexFullMatch", "STFT"),
        *("SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"),
        *("SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer"),
        *("StringSplit", "TfIdfVectorizer", "Unique"),
    }
)
"""Standard operators of opsets up to 20 that it does not have."""

OPSETS = range(9, 21)

DTYPES = frozenset(
    {
        *(TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.FLOAT8E4M3FN, TensorProto.DOUBLE),
        *(TensorProto.INT8, TensorProto.INT4, TensorProto.INT32, TensorProto.INT64, TensorProto.BOOL),
    }
)
"""Element types of the values between nodes; it reads float64 as float32."""

LARGEST_K = 3839
"""Of TopK."""

_STANDARD = ("", "ai.onnx")


def preflight(path: Path) -> tuple[Refusal, ...]:
    """Every node of a file that the list does not have; empty means that nothing is known to be in the way.

    Raises:
        InputError: the file cannot be read.
    """
    model = read_model(path)
    return tuple(_refusals(model))


def _refusals(model: onnx.ModelProto) -> Iterator[Refusal]:
    (opset,) = (entry.version for entry in model.opset_import if entry.domain in _STANDARD)
    if opset not in OPSETS:
        yield Refusal("", "", f"opset {opset} is not one of {OPSETS.start} to {OPSETS.stop - 1}")
    for graph in _graphs(model.graph):
        file = _File(graph)
        for node in graph.node:
            for reason in _reasons(node, file):
                yield Refusal(node.name, node.op_type, reason)


class _File:
    """What the conditions of nodes ask for: constants by name, and the types and ranks of values."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.constants = {tensor.name: tensor for tensor in graph.initializer}
        values = (*graph.input, *graph.value_info, *graph.output)
        self.types = {value.name: value.type.tensor_type for value in values}

    def all_zero(self, name: str) -> bool:
        return name in self.constants and not numpy_helper.to_array(self.constants[name]).astype(float).any()

    def rank(self, name: str) -> int | None:
        return len(self.types[name].shape.dim) if name in self.types else None

    def dtype(self, name: str) -> int:
        """0 where it is not known."""
        return int(self.types[name].elem_type) if name in self.types else 0


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _reasons(node: onnx.NodeProto, file: _File) -> Iterator[str]:
    if node.domain not in _STANDARD:
        yield f"{node.domain} is no domain of the ONNX standard"
    elif node.op_type in LACKS:
        yield "the parser does not have it"
    elif (condition := CONDITIONS.get(node.op_type)) and (reason := condition(node, file)):
        yield reason
    for name in node.output:
        if (dtype := file.dtype(name)) and dtype not in DTYPES:
            yield f"{TensorProto.DataType.Name(dtype).lower()} is no type of the values of a network"


Condition = Callable[[onnx.NodeProto, _File], str | None]


def _attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    found = [onnx.helper.get_attribute_value(each) for each in node.attribute if each.name == name]
    value = found[0] if found else default
    return value.decode() if isinstance(value, bytes) else value


def _pool(node: onnx.NodeProto, _file: _File) -> str | None:
    dilations = _attribute(node, "dilations", [])
    if any(each != 1 for each in dilations):  # type: ignore[attr-defined]
        return "dilations other than 1 are not taken"
    if len([name for name in node.output if name]) > 1:
        return "it has no output of indices"
    return None


def _one_output(node: onnx.NodeProto, _file: _File) -> str | None:
    return "only its first output is known" if len([name for name in node.output if name]) > 1 else None


def _constant(index: int) -> Condition:
    def condition(node: onnx.NodeProto, file: _File) -> str | None:
        name = node.input[index] if len(node.input) > index else ""
        return f"its {_ORDINALS[index]} input must be an initialiser" if name and name not in file.constants else None

    return condition


def _no_reduction(node: onnx.NodeProto, _file: _File) -> str | None:
    mode = _attribute(node, "reduction", "none")
    return None if mode == "none" else f"reduction {mode} is not taken"


def _top_k(node: onnx.NodeProto, file: _File) -> str | None:
    if not _attribute(node, "sorted", 1):
        return "sorted must be 1"
    k = file.constants.get(node.input[1])
    largest = int(numpy_helper.to_array(k).max()) if k is not None else 0
    return None if largest <= LARGEST_K else f"k is {largest}, more than {LARGEST_K}"


def _resize(node: onnx.NodeProto, _file: _File) -> str | None:
    for name, default, valid in _RESIZE:
        if (value := _attribute(node, name, default)) not in valid:
            return f"{name} {value} is not taken"
    return None


def _four_dimensions(node: onnx.NodeProto, file: _File) -> str | None:
    rank = file.rank(node.input[0])
    return None if rank in (None, 4) else f"its input has {rank} dimensions, not 4"


def _zero_point(node: onnx.NodeProto, file: _File) -> str | None:
    name = node.input[2] if len(node.input) > 2 else ""
    return "its zero point must be 0" if name and not file.all_zero(name) else None


def _lstm(node: onnx.NodeProto, _file: _File) -> str | None:
    wrong = [name for name in ("input_forget", "layout") if _attribute(node, name, 0)]
    return f"{wrong[0]} must be 0" if wrong else None


_ORDINALS = ("first", "second", "third", "fourth")
_RESIZE = (
    ("mode", "nearest", ("nearest", "linear", "cubic")),
    (
        "coordinate_transformation_mode",
        "half_pixel",
        ("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
    ),
    ("antialias", 0, (0,)),
    ("keep_aspect_ratio_policy", "stretch", ("stretch",)),
)

CONDITIONS: Mapping[str, Condition] = {
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), _pool),
    "LayerNormalization": _one_output,
    **dict.fromkeys(("CumSum", "Squeeze", "Unsqueeze"), _constant(1)),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"), _constant(1)),
    **dict.fromkeys(("Slice", "Pad"), _constant(3)),
    "ScatterND": _no_reduction,
    "TopK": _top_k,
    "Resize": _resize,
    "GridSample": _four_dimensions,
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), _zero_point),
    "LSTM": _lstm,
}
"""Operator → what is wrong with a node of it, None if nothing."""
