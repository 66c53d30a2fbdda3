import models_fidelity
import pytest
import torch
from models_checks import assert_exports, assert_refuses_what_is_no_image, assert_runs_at, distinct, image

from mobilemix.errors import CheckpointError, UnknownNameError
from mobilemix.models import casvit

ROUNDING = 1e-5


@pytest.mark.parametrize("variant", casvit.VARIANTS)
def test_matches_the_authors_implementation(variant: str) -> None:
    models_fidelity.check(casvit.build(variant), variant)


def test_two_heads_are_averaged_in_eval_mode() -> None:
    both = distinct(casvit.build("casvit_xs", num_classes=7))
    one = casvit.build("casvit_xs", num_classes=7, distillation=False).eval()
    x = image(1, 3, 64, 64)
    weights = both.state_dict()
    logits = []
    for head in ("head", "dist_head"):
        one.load_state_dict({name: weights[name.replace("head", head)] for name in one.state_dict()}, strict=True)
        with torch.no_grad():
            logits.append(one(x))
    assert not torch.allclose(*logits)
    with torch.no_grad():
        mean = both(x)
    torch.testing.assert_close(mean, sum(logits) / 2, rtol=ROUNDING, atol=ROUNDING)


def test_training_returns_both_heads_and_reaches_every_parameter() -> None:
    model = distinct(casvit.build("casvit_xs", num_classes=7)).train()
    logits, distilled = model(image(2, 3, 64, 64))
    assert logits.shape == distilled.shape == (2, 7)
    (logits.square().sum() + distilled.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_features_are_the_four_normed_stages() -> None:
    classifier = distinct(casvit.build("casvit_xs", num_classes=7, distillation=False))
    backbone = casvit.build("casvit_xs", features_only=True).eval()
    names = {name.partition(".")[0] for name in backbone.state_dict()}
    assert names == {"patch_embed", "network", "norm0", "norm2", "norm4", "norm6"}

    backbone.load_state_dict(classifier.state_dict(), strict=False)
    backbone.norm6 = classifier.norm
    x = image(1, 3, 64, 96)
    with torch.no_grad():
        maps = backbone(x)
        logits = classifier.get_submodule("head")(maps[-1].mean((-2, -1)))
        torch.testing.assert_close(logits, classifier(x), rtol=ROUNDING, atol=ROUNDING)
    assert [tuple(m.shape) for m in maps] == [(1, 48, 16, 24), (1, 56, 8, 12), (1, 112, 4, 6), (1, 220, 2, 3)]


@pytest.mark.parametrize("distillation", [False, True])
def test_classifier_checkpoint_tells_its_options(distillation: bool) -> None:
    model = casvit.build("casvit_xs", num_classes=7, in_channels=1, distillation=distillation)
    options = casvit.options_from_checkpoint(model.state_dict())
    assert options == {"distillation": distillation, "num_classes": 7, "in_channels": 1}
    casvit.build("casvit_xs", **options).load_state_dict(model.state_dict(), strict=True)  # type: ignore[arg-type]


def test_dense_checkpoint_tells_its_options() -> None:
    model = casvit.build("casvit_xs", in_channels=1, features_only=True)
    options = casvit.options_from_checkpoint(model.state_dict())
    assert options == {"features_only": True, "in_channels": 1}
    casvit.build("casvit_xs", **options).load_state_dict(model.state_dict(), strict=True)  # type: ignore[arg-type]


def test_foreign_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"patch_embed\.0\.weight"):
        casvit.options_from_checkpoint({"head.weight": torch.zeros(7, 220)})


def test_unknown_variant_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="casvit_xs"):
        casvit.build("casvit_xl")


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (64, 96)])
def test_any_input_size_runs(size: tuple[int, int]) -> None:
    model = casvit.build("casvit_xs", num_classes=7, in_channels=1).eval()
    assert_runs_at(model, size, classes=7)


@pytest.mark.parametrize("features_only", [False, True])
def test_impossible_inputs_are_refused(features_only: bool) -> None:
    model = casvit.build("casvit_xs", features_only=features_only).eval()
    assert_refuses_what_is_no_image(model)


@pytest.mark.parametrize("features_only", [False, True])
def test_export_agrees_with_eager_in_plain_operators(features_only: bool) -> None:
    model = distinct(casvit.build("casvit_xs", num_classes=7, features_only=features_only))
    assert_exports(model, image(1, 3, 64, 96))
