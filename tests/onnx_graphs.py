"""Graphs in ONNX's text syntax, rewritten and held against themselves before."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mobilemix.parity import relative_l2

ROUNDING = 2e-6
"""Relative L2 between a graph and its rewrite, both in float32."""


def noise(*shape: int) -> np.ndarray:
    """Weights, the same every time."""
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(np.float32)


def rewrite(
    text: str, weights: Mapping[str, np.ndarray], steps: Iterable[Callable[[ir.Model], object]]
) -> list[tuple[str, tuple[int, ...]]]:
    """Apply steps to a graph, compare its outputs on noise, and list the operators with their first outputs' shapes.

    Args:
        text: `(inputs) => (outputs) { nodes }`; types of the values in between are inferred.
        weights: initialisers by the names that the nodes call them.
        steps: of `mobilemix.targets.onnx.rewrites`.
    """
    graph = onnx.parser.parse_graph(f"small {text}")
    graph.initializer.extend(onnx.numpy_helper.from_array(content, name) for name, content in weights.items())
    source = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(source, strict_mode=True))
    for step in steps:
        step(model)
    result = ir.to_proto(model)
    onnx.checker.check_model(result, full_check=True)
    for found, expected in zip(_run(result), _run(source), strict=True):
        assert found.shape == expected.shape
        assert relative_l2(found, expected) < ROUNDING
    inferred = ir.from_proto(onnx.shape_inference.infer_shapes(result, strict_mode=True))
    return [(node.op_type, tuple(map(int, node.outputs[0].shape))) for node in inferred.graph]


def operators(found: Iterable[tuple[str, tuple[int, ...]]]) -> list[str]:
    """Operator types alone."""
    return [operator for operator, _ in found]


def _run(model: onnx.ModelProto) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {value.name: noise(*value.shape) for value in session.get_inputs()})
