"""Rules for the operators of ONNX files, by theme; importing this package completes `RULES`."""

from mobilemix.targets.onnx.onnx_ops import control, elementwise, products, quantized, reduction, shape
from mobilemix.targets.onnx.onnx_ops.base import RULES, SEVERAL

__all__ = ["RULES", "SEVERAL", "control", "elementwise", "products", "quantized", "reduction", "shape"]
