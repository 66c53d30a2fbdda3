"""What the tests of the passes share: a pass alone on a module, and the result against eager PyTorch in float64."""

import collections
import copy

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from mobilemix.capture import capture
from mobilemix.passes.base import Pass

TOLERANCE = 2e-6
"""Relative L2 error of a rewritten float32 program against float64."""


def rewritten(step: Pass, module: nn.Module, *inputs: Tensor) -> ExportedProgram:
    """The captured module after one pass, which has to change it and to leave nothing for a second run."""
    program = capture(module, inputs)
    before = str(program.graph)
    result = step(program)
    assert result.modified
    assert str(program.graph) == before, "a pass must not change the program that it is given"
    assert not step(result.program).modified, "a second run finds more to do"
    return result.program


def assert_untouched(step: Pass, module: nn.Module, *inputs: Tensor) -> None:
    program = capture(module, inputs)
    result = step(program)
    assert not result.modified
    assert result.program is program


def relative_error(program: ExportedProgram, module: nn.Module, *inputs: Tensor) -> float:
    """The largest relative L2 error of an output against the module in float64."""
    with torch.no_grad():
        expected = pytree.tree_leaves(widened(module)(*map(_widen, inputs)))
        found = pytree.tree_leaves(program.module()(*inputs))
    assert [value.shape for value in found] == [value.shape for value in expected]
    errors = [(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in zip(found, expected, strict=True)]
    return max(map(float, errors))


def trained(norm: nn.Module) -> nn.Module:
    """A norm with parameters and statistics as far from those of a new one as training makes them."""
    for name, tensor in norm.state_dict(keep_vars=True).items():
        if name.endswith("running_var"):
            tensor.data.uniform_(0.1, 3)
        elif tensor.is_floating_point():
            tensor.data.normal_()
    return norm


def widened(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode with float64 and complex128 parameters."""
    return copy.deepcopy(module).eval()._apply(_widen)


def operators(program: ExportedProgram) -> collections.Counter[str]:
    """How often each ATen operator occurs, by its name without overload."""
    targets = [node.target for node in program.graph.nodes]
    return collections.Counter(op._opname for op in targets if isinstance(op, torch._ops.OpOverload))


def assert_real(program: ExportedProgram) -> None:
    """No complex value and no Fourier transform is left."""
    for node in program.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            assert not (isinstance(value, Tensor) and value.is_complex()), node.format_node()
    assert not [name for name in operators(program) if "fft" in name or "complex" in name]


def _widen(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return tensor.to(torch.complex128)
    return tensor.double() if tensor.is_floating_point() else tensor
