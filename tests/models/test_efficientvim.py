import math

import models_fidelity
import pytest
import torch
import torch.nn.functional as F
from models_checks import assert_exports, assert_refuses_what_is_no_image, assert_runs_at, distinct, image

from mobilemix.errors import CheckpointError, UnknownNameError
from mobilemix.models import efficientvim

ROUNDING = 1e-5
DOUBLE_ROUNDING = 1e-12


@pytest.mark.parametrize("variant", efficientvim.VARIANTS)
def test_matches_the_authors_implementation(variant: str) -> None:
    models_fidelity.check(efficientvim.build(variant), variant)


def test_distilled_model_matches_the_authors_implementation() -> None:
    models_fidelity.check(efficientvim.build("efficientvim_m1", distillation=True), "efficientvim_m1_dist")


def test_mixer_matches_the_recurrence_free_definition() -> None:
    """Position by position and state by state, in float64, with the transition A that cancels in the softmax."""
    channels, count, (height, width) = 6, 4, (3, 5)
    length = height * width
    mixer = distinct(efficientvim.HiddenStateMixer(channels, count)).double()
    x = image(1, channels, length).double()
    weight = {name.removesuffix(".conv.weight"): w.squeeze(-1) for name, w in mixer.state_dict().items()}
    with torch.no_grad():
        mixed, states = mixer(x, (height, width))

    kernels = mixer.state_dict()["dw.conv.weight"]
    projected = F.pad((weight["BCdt_proj"] @ x[0]).view(-1, height, width), (1, 1, 1, 1))
    local = torch.zeros(3 * count, length, dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            patch = projected[:, row : row + 3, column : column + 3]
            local[:, row * width + column] = (patch * kernels[:, 0]).sum((-2, -1))
    b, c, dt = local.split(count)
    hidden = torch.zeros(channels, count, dtype=torch.float64)
    for n in range(count):
        transition = [math.exp(float(dt[n, position] + mixer.A[n])) for position in range(length)]
        for position in range(length):
            hidden[:, n] += transition[position] / sum(transition) * b[n, position] * x[0, :, position]
    h, z = (weight["hz_proj"] @ hidden).split(channels)
    hidden = weight["out_proj"] @ (h * F.silu(z) + h * mixer.state_dict()["D"])

    torch.testing.assert_close(states[0], hidden, rtol=DOUBLE_ROUNDING, atol=DOUBLE_ROUNDING)
    output = torch.stack([hidden @ c[:, position] for position in range(length)], dim=-1)
    torch.testing.assert_close(mixed[0].flatten(1), output, rtol=DOUBLE_ROUNDING, atol=DOUBLE_ROUNDING)


def test_two_sets_of_heads_are_averaged_in_eval_mode() -> None:
    both = distinct(efficientvim.build("efficientvim_m1", num_classes=7, distillation=True))
    one = efficientvim.build("efficientvim_m1", num_classes=7).eval()
    x = image(1, 3, 64, 64)
    weights = both.state_dict()
    logits = []
    for heads in ("heads", "heads_dist"):
        renames = {"heads": heads, "weights": heads.replace("heads", "weights")}
        split = {name: name.partition(".") for name in one.state_dict()}
        own = {name: weights["".join((renames.get(first, first), *rest))] for name, (first, *rest) in split.items()}
        one.load_state_dict(own, strict=True)
        with torch.no_grad():
            logits.append(one(x))
    assert not torch.allclose(*logits)
    with torch.no_grad():
        mean = both(x)
    torch.testing.assert_close(mean, sum(logits) / 2, rtol=ROUNDING, atol=ROUNDING)


def test_training_returns_both_logits_and_reaches_every_parameter() -> None:
    model = distinct(efficientvim.build("efficientvim_m1", num_classes=7, distillation=True)).train()
    logits, distilled = model(image(2, 3, 128, 128))
    assert logits.shape == distilled.shape == (2, 7)
    (logits.square().sum() + distilled.square().sum()).backward()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert [name for name, p in trained if p.grad is None] == []
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if not p.requires_grad} == {"A"}


def test_features_are_the_three_stages() -> None:
    model = efficientvim.build("efficientvim_m4", features_only=True).eval()
    assert {name.partition(".")[0] for name in model.state_dict()} == {"patch_embed", "stages"}
    with torch.no_grad():
        maps = model(image(1, 3, 128, 192))
    assert [tuple(m.shape) for m in maps] == [(1, 224, 8, 12), (1, 320, 4, 6), (1, 512, 2, 3)]


@pytest.mark.parametrize("distillation", [False, True])
def test_classifier_checkpoint_tells_its_options(distillation: bool) -> None:
    model = efficientvim.build("efficientvim_m1", num_classes=7, in_channels=1, distillation=distillation)
    options = efficientvim.options_from_checkpoint(model.state_dict())
    assert options == {"distillation": distillation, "num_classes": 7, "in_channels": 1}
    again = efficientvim.build("efficientvim_m1", **options)  # type: ignore[arg-type]
    again.load_state_dict(model.state_dict(), strict=True)


def test_dense_checkpoint_tells_its_options() -> None:
    model = efficientvim.build("efficientvim_m1", in_channels=1, features_only=True)
    options = efficientvim.options_from_checkpoint(model.state_dict())
    assert options == {"features_only": True, "in_channels": 1}
    again = efficientvim.build("efficientvim_m1", **options)  # type: ignore[arg-type]
    again.load_state_dict(model.state_dict(), strict=True)


def test_foreign_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"patch_embed\.conv\.0\.conv\.weight"):
        efficientvim.options_from_checkpoint({"heads.0.weight": torch.zeros(7, 128)})


def test_unknown_variant_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="efficientvim_m1"):
        efficientvim.build("efficientvim_m5")


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (64, 160)])
def test_any_input_size_runs(size: tuple[int, int]) -> None:
    model = efficientvim.build("efficientvim_m1", num_classes=7, in_channels=1).eval()
    assert_runs_at(model, size, classes=7)


@pytest.mark.parametrize("features_only", [False, True])
def test_impossible_inputs_are_refused(features_only: bool) -> None:
    model = efficientvim.build("efficientvim_m1", features_only=features_only).eval()
    assert_refuses_what_is_no_image(model)


@pytest.mark.parametrize("options", [{}, {"distillation": True}, {"features_only": True}])
def test_export_agrees_with_eager_in_plain_operators(options: dict[str, bool]) -> None:
    model = distinct(efficientvim.build("efficientvim_m1", num_classes=7, **options))
    assert_exports(model, image(1, 3, 64, 96))
