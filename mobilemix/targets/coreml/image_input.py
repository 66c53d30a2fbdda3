"""Normalisation folded into the program, for packages that take pixels.

Core ML's image preprocessing is one scale for all channels and one bias per channel, so x = (p / 255 − mean) / std is
split in two. Core ML computes u = p / 255 − mean, and the program is made to take u instead of x, by `take_unscaled`.
"""

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

_CONVOLUTIONS = (torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default)
_GROUPS_ARGUMENT = {torch.ops.aten.conv2d.default: 6, torch.ops.aten.convolution.default: 8}


def take_unscaled(program: ExportedProgram, std: tuple[float, ...]) -> None:
    """Make `program`, in place, take u where it took x = u / std, u of shape (1, channels, height, width).

        before   x → conv(weight)             x → any other consumer
        after    u → conv(weight / std)       u → mul(1 / std) → any other consumer

    A scale of the input channels commutes with zero padding (a shift would not), so folding it into a convolution is
    exact but for one rounding of each weight, done in float64. A grouped convolution, or a weight with a second
    consumer, takes the explicit multiplication.
    """
    (name,) = program.graph_signature.user_inputs
    image = next(node for node in program.graph.nodes if node.name == name)
    inverse = 1 / torch.tensor(std, dtype=torch.float64)
    weight = _private_weight(image)
    if weight is not None:
        tensors, key = _stored(program, weight)
        tensors[key] = (tensors[key].double() * inverse.reshape(1, -1, 1, 1)).float()
        return
    _multiply(program, image, inverse.reshape(1, -1, 1, 1).float())


def _private_weight(image: torch.fx.Node) -> torch.fx.Node | None:
    """The weight of the ungrouped convolution that alone consumes `image`, if nothing else uses that weight."""
    if len(image.users) != 1:
        return None
    (consumer,) = image.users
    if consumer.target not in _CONVOLUTIONS or consumer.args[0] is not image:
        return None
    position = _GROUPS_ARGUMENT[consumer.target]
    groups = consumer.args[position] if len(consumer.args) > position else consumer.kwargs.get("groups", 1)
    weight = consumer.args[1]
    if groups != 1 or not isinstance(weight, torch.fx.Node) or weight.op != "placeholder" or len(weight.users) != 1:
        return None
    return weight


def _stored(program: ExportedProgram, placeholder: torch.fx.Node) -> tuple[dict[str, torch.Tensor], str]:
    """The dictionary of `program`, and the key in it, that hold a placeholder's tensor."""
    spec = next(spec for spec in program.graph_signature.input_specs if spec.arg.name == placeholder.name)
    assert spec.target is not None
    return (program.state_dict if spec.target in program.state_dict else program.constants), spec.target


def _multiply(program: ExportedProgram, image: torch.fx.Node, factor: torch.Tensor) -> None:
    """Put image · factor in front of every consumer of `image`; the factor becomes a constant of the program."""
    users = list(image.users)
    with program.graph.inserting_before(image):
        constant = program.graph.placeholder("inverse_std")
    fake = image.meta["val"]
    constant.meta["val"] = fake.new_empty(factor.shape)
    with program.graph.inserting_before(users[0]):
        scaled = program.graph.call_function(torch.ops.aten.mul.Tensor, (image, constant))
    scaled.meta["val"] = torch.empty_like(fake)
    for user in users:
        user.replace_input_with(image, scaled)
    argument = TensorArgument(name=constant.name)
    spec = InputSpec(InputKind.CONSTANT_TENSOR, argument, target=constant.name)
    specs = program.graph_signature.input_specs
    specs.insert(next(i for i, spec in enumerate(specs) if spec.arg.name == image.name), spec)
    program.constants[constant.name] = factor
    program.graph_module.recompile()
