"""What Core ML asks of a program's ends: pixels in, and outputs that can be named.

Core ML's image preprocessing is one scale for all channels and one bias per channel, so x = (p / 255 − mean) / std is
split in two. Core ML computes u = p / 255 − mean, and the program is made to take u instead of x, by `take_unscaled`.
"""

import torch
from torch import fx
from torch.export import ExportedProgram

from mobilemix.passes.base import arguments
from mobilemix.passes.editing import Edit

aten = torch.ops.aten


def take_unscaled(program: ExportedProgram, std: tuple[float, ...]) -> ExportedProgram:
    """The program that takes u where `program` took x = u / std; u has the shape (1, channels, height, width).

        before   x → conv(weight)             x → any other consumer
        after    u → conv(weight / std)       u → mul(1 / std) → any other consumer

    A scale of the input channels commutes with zero padding (a shift would not), so folding it into a convolution is
    exact but for one rounding of each weight, done in float64. A grouped convolution, or an input with more than one
    consumer, takes the explicit multiplication.
    """
    edit = Edit(program)
    (name,) = program.graph_signature.user_inputs
    image = next(node for node in edit.graph.nodes if node.name == name)
    inverse = (1 / torch.tensor(std, dtype=torch.float64)).reshape(1, -1, 1, 1)
    consumers = list(image.users)
    first = next(node for node in edit.graph.nodes if node.op != "placeholder")
    with edit.at(first):
        weight = _weight(consumers)
        tensor = edit.constant(weight)
        if weight is not None and tensor is not None:
            folded = edit.add_constant(edit.name(weight), (tensor.double() * inverse).float())
            consumers[0].replace_input_with(weight, folded)
        else:
            scaled = edit.emit(aten.mul.Tensor, image, edit.add_constant("inverse_std", inverse.float()))
            for consumer in consumers:
                consumer.replace_input_with(image, scaled)
    edit.changed = True
    return edit.finish().program


def _weight(consumers: list[fx.Node]) -> fx.Node | None:
    """The weight of the ungrouped convolution that alone consumes the image."""
    if len(consumers) != 1 or consumers[0].target not in (aten.conv2d.default, aten.convolution.default):
        return None
    values = arguments(consumers[0])
    weight: fx.Node = values["weight"]
    return weight if values["groups"] == 1 else None


_LOGICAL = {
    aten.__and__.Tensor: aten.logical_and.default,
    aten.__or__.Tensor: aten.logical_or.default,
    aten.__xor__.Tensor: aten.logical_xor.default,
}


def plain_flags(program: ExportedProgram) -> ExportedProgram:
    """The program that takes int32 where `program` took booleans, of which Core ML has no arrays, nor bits of them.

    before   mask (bool) → any consumer;                  __and__ (bool, bool)
    after    mask (int32) → ne(0) → any consumer;         logical_and (bool, bool)
    """
    edit = Edit(program)
    names = set(program.graph_signature.user_inputs)
    first = next(node for node in edit.graph.nodes if node.op != "placeholder")
    for node in list(edit.graph.nodes):
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
            continue
        if node.target in _LOGICAL:
            node.target = _LOGICAL[node.target]
            edit.changed = True
        elif node.op == "placeholder" and node.name in names:
            node.meta["val"] = edit.empty(value.shape, torch.int32)
            with edit.at(first):
                flag = edit.emit(aten.ne.Scalar, node, 0)
            node.replace_all_uses_with(flag, delete_user_cb=lambda user, flag=flag: user is not flag)
            edit.changed = True
    return edit.finish().program


def distinct_outputs(program: ExportedProgram) -> ExportedProgram:
    """`program` with a copy where an output is an input or another output, which Core ML cannot name twice.

    before   x → output 0, output 1
    after    x → output 0;  x → mul(1) → output 1
    """
    edit = Edit(program)
    output = edit.graph.output_node()
    seen = set(edit.graph.find_nodes(op="placeholder"))
    values: list[object] = []
    with edit.at(output):
        for value in output.args[0]:
            values.append(edit.emit(aten.mul.Tensor, value, 1.0) if value in seen else value)
            seen.add(value)
    if values != list(output.args[0]):
        output.args = (tuple(values),)
        edit.changed = True
    return edit.finish().program
