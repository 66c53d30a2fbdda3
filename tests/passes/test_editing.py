import torch
from torch import Tensor, nn

from mobilemix.capture import capture
from mobilemix.passes.editing import Edit, bias_name

aten = torch.ops.aten
X = torch.randn(2, 3)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.unused = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [x * self.weight, x]


def test_an_edited_program_runs_and_the_original_is_kept() -> None:
    program = capture(Doubled(), (X,))
    edit = Edit(program)
    (product,) = edit.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    with edit.at(product):
        offset = edit.add_constant("weight", torch.arange(3.0))
        edit.replace(product, edit.emit(aten.add.Tensor, product.args[0], offset))
    result = edit.finish()
    found = result.program.module()(X)
    assert torch.equal(found[0], X + torch.arange(3.0))
    assert torch.equal(found[1], X)
    assert set(result.program.state_dict) == {"weight"}, "the old weight and the unused one are gone"
    assert set(program.state_dict) == {"weight", "unused"}
    (added,) = result.program.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    assert __file__ in added.meta["stack_trace"]


def test_equal_constants_are_one_and_names_are_unique() -> None:
    edit = Edit(capture(Doubled(), (X,)))
    (product,) = edit.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    (output,) = edit.graph.find_nodes(op="output")
    first, again = (edit.add_constant("weight", torch.ones(3)) for _ in range(2))
    other, integers = edit.add_constant("weight", torch.zeros(3)), edit.add_constant("ones", torch.ones(3).long())
    assert first is again
    assert len({first, other, integers}) == 3
    with edit.at(output):
        value = product
        for constant in (first, other, integers):
            value = edit.emit(aten.add.Tensor, value, constant)
    output.replace_input_with(product, value)
    edit.changed = True
    assert set(edit.finish().program.state_dict) == {"weight", "weight_1", "weight_2", "ones"}


def test_nothing_changed_is_the_same_program() -> None:
    program = capture(Doubled(), (X,))
    result = Edit(program).finish()
    assert result.program is program
    assert not result.modified


def test_buffers_that_the_program_writes_are_no_constants() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x + self.count

    program = torch.export.export(Counter(), (X,)).run_decompositions({})
    edit = Edit(program)
    assert all(edit.constant(node) is None for node in edit.graph.nodes)


def test_bias_names() -> None:
    assert bias_name("stem.conv.weight") == "stem.conv.bias"
    assert bias_name("filter.w1") == "filter.w1_bias"
