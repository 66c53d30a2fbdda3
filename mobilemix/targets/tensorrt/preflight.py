"""What NVIDIA's parser takes, by its own list, held against an ONNX file with nothing installed.

The list is that of the oldest parser that is supported, because what it takes newer ones take too: onnx-tensorrt,
docs/operators.md, release 10.0. Conditions that shapes and constants of an exported program always meet are left out.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

from mobilemix.targets.base import Array
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
    return tuple(refusals(read_model(path)))


def refusals(model: onnx.ModelProto) -> Iterator[Refusal]:
    """The same of a model in memory; what depends on types that it does not state is let pass."""
    values = _Values(model.graph)
    for node in values.nodes:
        for reason in _reasons(node, values):
            yield Refusal(node.name, node.op_type, reason)


class _Values:
    """What the conditions of nodes ask for: constants by name, and the types and ranks of values, of all graphs."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        graphs = list(_graphs(graph))
        self.nodes = [node for each in graphs for node in each.node]
        self.constants = {tensor.name: tensor for each in graphs for tensor in each.initializer}
        for node in self.nodes:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        values = [value for each in graphs for value in (*each.input, *each.value_info, *each.output)]
        self.types = {value.name: value.type.tensor_type for value in values}

    def constant(self, name: str) -> Array | None:
        """None for what is computed, and for what lies in a file of weights beside the model."""
        tensor = self.constants.get(name)
        stored = tensor is not None and tensor.data_location != TensorProto.EXTERNAL
        return numpy_helper.to_array(tensor) if stored else None

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


def _reasons(node: onnx.NodeProto, values: _Values) -> Iterator[str]:
    if node.domain not in _STANDARD:
        return  # it may be a plugin's
    if node.op_type in LACKS:
        yield "NVIDIA's parser does not have it"
    elif (condition := CONDITIONS.get(node.op_type)) and (reason := condition(node, values)):
        yield reason
    for name in node.output:
        if (dtype := values.dtype(name)) and dtype not in DTYPES:
            yield f"{TensorProto.DataType.Name(dtype).lower()} is no type of the values of a network"


Condition = Callable[[onnx.NodeProto, _Values], str | None]


def _attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    found = [onnx.helper.get_attribute_value(each) for each in node.attribute if each.name == name]
    value = found[0] if found else default
    return value.decode() if isinstance(value, bytes) else value


def _pool(node: onnx.NodeProto, _values: _Values) -> str | None:
    dilations = _attribute(node, "dilations", [])
    if any(each != 1 for each in dilations):  # type: ignore[attr-defined]
        return "dilations other than 1 are not taken"
    if len([name for name in node.output if name]) > 1:
        return "it has no output of indices"
    return None


def _one_output(node: onnx.NodeProto, _values: _Values) -> str | None:
    return "only its first output is known" if len([name for name in node.output if name]) > 1 else None


def _constant(index: int) -> Condition:
    def condition(node: onnx.NodeProto, values: _Values) -> str | None:
        name = node.input[index] if len(node.input) > index else ""
        return f"its {_ORDINALS[index]} input must be an initialiser" if name and name not in values.constants else None

    return condition


def _no_reduction(node: onnx.NodeProto, _values: _Values) -> str | None:
    mode = _attribute(node, "reduction", "none")
    return None if mode == "none" else f"reduction {mode} is not taken"


def _top_k(node: onnx.NodeProto, values: _Values) -> str | None:
    if not _attribute(node, "sorted", 1):
        return "sorted must be 1"
    k = values.constant(node.input[1])
    largest = int(k.max()) if k is not None else 0
    return None if largest <= LARGEST_K else f"k is {largest}, more than {LARGEST_K}"


def _resize(node: onnx.NodeProto, _values: _Values) -> str | None:
    for name, default, valid in _RESIZE:
        if (value := _attribute(node, name, default)) not in valid:
            return f"{name} {value} is not taken"
    return None


def _four_dimensions(node: onnx.NodeProto, values: _Values) -> str | None:
    rank = values.rank(node.input[0])
    return None if rank in (None, 4) else f"its input has {rank} dimensions, not 4"


def _zero_point(node: onnx.NodeProto, values: _Values) -> str | None:
    zero = values.constant(node.input[2]) if len(node.input) > 2 else None
    return "its zero point must be 0" if zero is not None and zero.astype(float).any() else None


def _lstm(node: onnx.NodeProto, _values: _Values) -> str | None:
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
