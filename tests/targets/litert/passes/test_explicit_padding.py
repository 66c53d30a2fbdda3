import pytest
import torch
from torch import nn
from torch.export import export

from mobilemix.targets.litert.passes.explicit_padding import ExplicitPadding

aten = torch.ops.aten
TOLERANCE = 1e-12


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [3, 4])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_words_become_numbers(padding: str, kernel: int, dilation: int, dimensions: int) -> None:
    torch.manual_seed(0)
    layer = (nn.Conv1d, nn.Conv2d)[dimensions - 1]
    model = layer(4, 6, kernel, padding=padding, dilation=dilation, groups=2).double().eval()
    x = torch.randn(2, 4, *(13 + axis for axis in range(dimensions)), dtype=torch.float64)
    result = ExplicitPadding()(export(model, (x,)))
    assert result.modified
    targets = {node.target for node in result.program.graph.nodes}
    assert not any(getattr(target, "_overloadname", "") == "padding" for target in targets)
    assert (aten.constant_pad_nd.default in targets) == (padding == "same" and dilation * (kernel - 1) % 2 == 1)
    torch.testing.assert_close(result.program.module()(x), model(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_sides_of_axes_that_differ() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 3, (4, 3), padding="same", dilation=(1, 2), bias=False).double().eval()
    x = torch.randn(1, 3, 7, 9, dtype=torch.float64)
    program = ExplicitPadding()(export(model, (x,))).program
    torch.testing.assert_close(program.module()(x), model(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_numbers_stay() -> None:
    program = export(nn.Conv1d(2, 2, 3, padding=1), (torch.randn(1, 2, 8),))
    result = ExplicitPadding()(program)
    assert not result.modified
    assert result.program is program
