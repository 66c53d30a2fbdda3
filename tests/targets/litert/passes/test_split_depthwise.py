import pytest
import torch
from torch import nn
from torch.export import export

from mobilemix.targets.litert.passes.split_depthwise import SplitDepthwise

RELATIVE = 1e-6


def _filters(program: torch.export.ExportedProgram) -> list[tuple[int, int]]:
    names = {spec.arg.name: spec.target for spec in program.graph_signature.input_specs}
    calls = program.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    return [tuple(program.state_dict[str(names[call.args[1].name])].shape[2:]) for call in calls]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("kernel", "size", "parts"),
    [
        ((7, 7), (9, 11), [(3, 7), (2, 7), (2, 7)]),
        ((7, 7), (3, 2), [(3, 7), (2, 7), (2, 7)]),
        ((9, 9), (9, 9), [(1, 9), (2, 9), (2, 9), (2, 9), (2, 9)]),
        ((9, 3), (12, 5), [(3, 3), (2, 3), (2, 3), (2, 3)]),
    ],
)
def test_large_filters_become_small_ones(
    kernel: tuple[int, int], size: tuple[int, int], parts: list[tuple[int, int]], bias: bool
) -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(6, 6, kernel, padding=(kernel[0] // 2, kernel[1] // 2), groups=6, bias=bias).double().eval()
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    result = SplitDepthwise()(export(model, (x,)))
    assert result.modified
    assert _filters(result.program) == parts
    torch.testing.assert_close(result.program.module()(x), model(x), rtol=RELATIVE, atol=RELATIVE)


@pytest.mark.parametrize(
    "model",
    [
        nn.Conv2d(4, 4, 5, padding=2, groups=4),  # small enough
        nn.Conv2d(4, 4, 7, padding=3),  # not depthwise
        nn.Conv2d(4, 4, 7, padding=3, stride=2, groups=4),
        nn.Conv2d(4, 4, 7, padding=0, groups=4),
        nn.Conv2d(4, 4, (7, 13), padding=(3, 6), groups=4),  # two rows are too large as well
    ],
)
def test_other_filters_stay(model: nn.Module) -> None:
    program = export(model.eval(), (torch.randn(1, 4, 16, 16),))
    result = SplitDepthwise()(program)
    assert result.program is program
