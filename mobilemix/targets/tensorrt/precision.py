"""In which precision each layer of an ONNX file computes, where the runtime keeps to the types that it states."""

import dataclasses
from collections.abc import Iterable

import onnx_ir as ir

NAMES = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
    ir.DataType.INT8: "int8",
    ir.DataType.FLOAT8E4M3FN: "fp8",
}

_CONVERSIONS = ("Cast", "Constant", "DequantizeLinear", "QuantizeLinear")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One node.

    Attributes:
        name: of the node, "module/value" in files of mobilemix.
        operator: ONNX's name.
        precision: a name of `NAMES`.
        module: path of the module that it is from; "" where none is known.
    """

    name: str
    operator: str
    precision: str
    module: str


def layers(nodes: Iterable[ir.Node]) -> tuple[Layer, ...]:
    """Every node of a graph that computes or moves floating-point numbers, in order."""
    found = ((node, of(node)) for node in nodes)
    return tuple(
        Layer(str(node.name), node.op_type, precision, str(node.name).rpartition("/")[0])
        for node, precision in found
        if precision is not None
    )


def of(node: ir.Node) -> str | None:
    """The precision of a node; None for conversions, and for what is about shapes or integers.

    A product of two dequantised values is one of 8-bit numbers: builders fuse the conversions into it.
    """
    if node.op_type in _CONVERSIONS or not node.outputs:
        return None
    if node.op_type in _PRODUCTS:
        operands = [value.producer() if value is not None else None for value in node.inputs[:2]]
        types = {
            operand.inputs[0].dtype
            for operand in operands
            if operand is not None and operand.op_type == "DequantizeLinear" and operand.inputs[0] is not None
        }
        dequantised = all(operand is not None and operand.op_type == "DequantizeLinear" for operand in operands)
        if dequantised and len(types) == 1:
            return NAMES.get(types.pop())
    dtype = node.outputs[0].dtype
    return None if dtype in (ir.DataType.INT8, None) else NAMES.get(dtype)
