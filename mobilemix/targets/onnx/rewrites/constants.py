"""Reading constants in rules."""

import numpy as np
import onnx_ir as ir


def array(value: ir.Value | None) -> np.ndarray | None:
    """The content of a constant value, or None if it is computed."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def constant(value: ir.Value) -> np.ndarray:
    """The content of a value that a rule's check has found to be constant."""
    content = array(value)
    assert content is not None
    return content
