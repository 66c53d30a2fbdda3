"""Reading constants in rules."""

import numpy as np
import onnx_ir as ir


def array(value: ir.Value | None) -> np.ndarray | None:
    """The content of a constant value, or None if it is computed."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
