"""What the tests of every family of backbones need: inputs, weights without symmetries, and the check of a capture."""

import models_fidelity
import pytest
import torch
from torch import Tensor, nn

from mobilemix.errors import InputError

EXPORT_TOLERANCE = 1e-5
GAIN = 0.7  # keeps the activations of the deepest backbones in range


def image(*shape: int) -> Tensor:
    """Standard normal values, the same at every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def distinct(model: nn.Module) -> nn.Module:
    """`model` in eval mode with weights of which no two tensors are alike, batch norm's statistics included."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(models_fidelity.weights(shapes, GAIN))
    return model.eval()


def assert_exports(model: nn.Module, x: Tensor, max_rank: int = 4) -> None:
    """Asserts that torch.export's capture equals eager, mutates nothing, and stays within `max_rank` dimensions."""
    program = torch.export.export(model, (x,), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=EXPORT_TOLERANCE, atol=EXPORT_TOLERANCE)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    mutating = [
        str(node.target)
        for node in calls
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]
    assert mutating == []
    assert max(node.meta["val"].ndim for node in calls if isinstance(node.meta["val"], Tensor)) <= max_rank


def assert_runs_at(model: nn.Module, size: tuple[int, int], classes: int) -> None:
    """Asserts that a classifier of one channel answers with finite logits at `size`."""
    with torch.no_grad():
        logits = model(image(1, 1, *size))
    assert logits.shape == (1, classes)
    assert logits.isfinite().all()


def assert_refuses_what_is_no_image(model: nn.Module) -> None:
    """Asserts that a model of three channels refuses a wrong rank, wrong channels and an empty side."""
    for shape in [(3, 64, 64), (1, 1, 64, 64), (1, 3, 0, 64), (1, 3, 64, 0)]:
        with pytest.raises(InputError, match=r"expected an image \(batch, 3, height, width\)"):
            model(torch.zeros(shape))
