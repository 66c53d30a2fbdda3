import copy
from collections.abc import Callable

import pytest
import torch
from passes_checks import operators
from torch import Tensor, nn
from torch.export import ExportedProgram

from mobilemix.capture import capture
from mobilemix.errors import CaptureError
from mobilemix.passes import lower


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.dropout = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)
        self.register_buffer("offset", torch.ones(4, 1, 1))

    def forward(self, image: Tensor, mask: Tensor) -> dict[str, object]:
        x = self.dropout(self.norm(self.conv(image)))
        return {"maps": [x, (x + self.offset,)], "masked": x * mask}


def test_names_and_structure_are_the_models_own() -> None:
    module = Nested()
    inputs = (torch.randn(2, 3, 4, 4), torch.ones(2, 1, 4, 4))
    program = capture(module, inputs)
    assert program.graph_signature.user_inputs == ("image", "mask")
    assert set(program.graph_signature.inputs_to_parameters.values()) == {name for name, _ in module.named_parameters()}
    assert "offset" in program.graph_signature.inputs_to_buffers.values()
    found, expected = program.module()(*inputs), module.eval()(*inputs)
    assert found.keys() == expected.keys()
    assert torch.equal(found["maps"][1][0], expected["maps"][1][0])
    assert torch.equal(found["masked"], expected["masked"])


def test_outputs_need_not_be_tensors() -> None:
    class Module(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, None, int, Tensor]:
            return torch.fft.fft(x).real, None, 3, x

    x = torch.randn(2, 3)
    program = lower(capture(Module(), (x,)))
    found = program.module()(x)
    assert found[1:3] == (None, 3)
    assert torch.equal(found[3], x)


def test_wide_parameters_become_single_precision() -> None:
    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex128))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.weight).abs()

    program = capture(Module(), (torch.randn(2, 3, dtype=torch.float64),))
    assert program.state_dict["weight"].dtype == torch.complex64
    assert program.module()(torch.randn(2, 3)).dtype == torch.float32


def test_the_module_is_left_as_it_is() -> None:
    module = Nested().double().train()
    before = copy.deepcopy(module.state_dict())
    program = capture(module, (torch.randn(2, 3, 4, 4).double(), torch.ones(2, 1, 4, 4).half()))
    assert module.training
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    values = [node.meta["val"] for node in program.graph.nodes if node.op != "output"]
    assert {value.dtype for value in values} <= {torch.float32, torch.int64}


class InPlace(nn.Module):
    """Writes into an activation."""

    def __init__(self, write: Callable[[Tensor], object]):
        super().__init__()
        self.write, self.norm = write, nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu(self.norm(x), inplace=True)
        y += 1
        self.write(y)
        return y * 3


PLACES: dict[str, Callable[[Tensor], object]] = {
    "everything": lambda y: y.mul_(2).add_(1),
    "a slice": lambda y: y[:, 1:].mul_(2),
    "slices of slices": lambda y: y[:, 1:, ::2, 0].copy_(torch.arange(2.0)),
    "twice": lambda y: (y[:, 0].zero_(), y[:, :2].add_(3)),
    "a slice of it in another": lambda y: y[:, 0].copy_(y[:, 1].clone()),
}


@pytest.mark.parametrize("place", PLACES)
def test_writing_operators_become_functional(place: str) -> None:
    module, x = InPlace(PLACES[place]), torch.randn(2, 3, 4, 4)
    program = capture(module, (x,))
    assert not [target for target in _targets(program) if target._schema.is_mutable]
    assert torch.equal(program.module()(x), module.eval()(x))
    assert operators(program)["batch_norm"] == 1, "torch's decomposition is not needed"


SHARED: dict[str, Callable[[Tensor], object]] = {
    "a view that is read later": lambda y: [view := y[:, 0], y.mul_(2), y.add_(view.unsqueeze(1) * 1)],
    "a view that is written twice": lambda y: y[:, 0].mul_(2).add_(1),
    "another kind of view": lambda y: y.flatten().mul_(2),
}


@pytest.mark.parametrize("place", SHARED)
def test_shared_memory_is_left_to_torch(place: str) -> None:
    module, x = InPlace(SHARED[place]), torch.randn(2, 3, 4, 4)
    program = capture(module, (x,))
    assert not [target for target in _targets(program) if target._schema.is_mutable]
    assert torch.allclose(program.module()(x), module.eval()(x))


def _targets(program: ExportedProgram) -> list[torch._ops.OpOverload]:
    return [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(7, -1)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class AlwaysDropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (
            Failing(),
            r"RuntimeError: shape '\[7, -1\]' is invalid .*\(at .*capture\.py:\d+ \(return x\.reshape\(7, -1\)\)\)",
        ),
        (Branching(), r"torch\.export could not capture the model: .*test_capture\.py:\d+"),
        (Random(), r"aten\.rand_like\.default at .*test_capture\.py:\d+ .* draws random numbers"),
        (AlwaysDropping(), r"aten\.dropout\.default at .*test_capture\.py:\d+ .* training mode"),
        (nn.BatchNorm2d(3, track_running_stats=False), r"aten\.batch_norm\.default at .* training mode"),
        (Counting(), r"changes calls when it runs"),
    ],
    ids=lambda item: type(item).__name__ if isinstance(item, nn.Module) else "",
)
def test_what_cannot_be_captured_is_explained_in_one_line(module: nn.Module, message: str) -> None:
    with pytest.raises(CaptureError, match=message) as caught:
        capture(module, (torch.randn(1, 3, 4, 4),))
    assert "\n" not in str(caught.value)


def test_dropout_and_attention_in_evaluation_mode_are_not_random() -> None:
    capture(nn.TransformerEncoderLayer(8, 2, batch_first=True), (torch.randn(1, 3, 8),))
