import pytest
import torch
import torch.nn.functional as F
from models_checks import assert_exports, distinct, image
from torch import Tensor, nn

from mobilemix.errors import CheckpointError, InputError, UnknownNameError
from mobilemix.models import dualtoken_vit

ROUNDING = 1e-5


def model(**options: object) -> nn.Module:
    return distinct(dualtoken_vit.build("dualtoken_vit_tiny", num_classes=7, **options))  # type: ignore[arg-type]


def global_tokens(network: nn.Module, x: Tensor) -> list[tuple[int, ...]]:
    """Shapes of the global tokens that each block hands on."""
    shapes: list[tuple[int, ...]] = []
    for module in network.modules():
        if isinstance(module, dualtoken_vit.Block):
            module.register_forward_hook(lambda _, __, outputs: shapes.append(tuple(outputs[1].shape)))
    with torch.no_grad():
        network(x)
    return shapes


@pytest.mark.parametrize(
    ("variant", "widths"), [("dualtoken_vit_tiny", (48, 96, 192)), ("dualtoken_vit_small", (64, 128, 256))]
)
def test_features_are_the_three_stages(variant: str, widths: tuple[int, ...]) -> None:
    backbone = dualtoken_vit.build(variant, features_only=True).eval()
    with torch.no_grad():
        maps = backbone(image(2, 3, 224, 224))
    expected = [(2, width, side, side) for width, side in zip(widths, (28, 14, 7), strict=True)]
    assert [tuple(features.shape) for features in maps] == expected


def test_features_share_the_classifiers_checkpoint() -> None:
    classifier = model()
    backbone = dualtoken_vit.build("dualtoken_vit_tiny", num_classes=7, features_only=True).eval()
    backbone.load_state_dict(classifier.state_dict(), strict=True)
    x = image(1, 3, 64, 96)
    with torch.no_grad():
        pooled = classifier.get_submodule("norm")(backbone(x)[-1]).mean((-2, -1))
        logits = classifier.get_submodule("head")(pooled)
        torch.testing.assert_close(logits, classifier(x), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("size", [(224, 224), (160, 96), (256, 320)])
def test_49_global_tokens_pass_through_every_block_at_any_size(size: tuple[int, int]) -> None:
    shapes = global_tokens(model(), image(1, 3, *size))
    assert shapes == [(1, width, 7, 7) for width in (48,) * 2 + (96,) * 3 + (192,) * 5]


@pytest.mark.parametrize("size", [(32, 32), (64, 32), (160, 160), (192, 192), (256, 224), (384, 384)])
def test_multiples_of_32_run(size: tuple[int, int]) -> None:
    with torch.no_grad():
        logits = model()(image(1, 3, *size))
    assert logits.shape == (1, 7)
    assert logits.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 3, 224, 225), (1, 3, 16, 32), (1, 3, 0, 32), (1, 1, 32, 32), (3, 32, 32)])
def test_other_inputs_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"multiples of 32, got \d+x\d+|expected an image"):
        model()(torch.zeros(shape))


def test_weighted_sum_keeps_every_token_at_its_position() -> None:
    torch.manual_seed(0)
    aggregated = torch.randn(1, 3, 7, 7)
    jacobian = torch.autograd.functional.jacobian(lambda tokens: dualtoken_vit.enrich(tokens, aggregated), aggregated)
    assert isinstance(jacobian, Tensor)
    torch.testing.assert_close(jacobian.reshape(147, 147), dualtoken_vit.CARRIED * torch.eye(147), rtol=0, atol=0)
    # A fixed point: where both agree, the tokens stay.
    torch.testing.assert_close(dualtoken_vit.enrich(aggregated, aggregated), aggregated, rtol=ROUNDING, atol=ROUNDING)


def test_global_tokens_know_where_they_are() -> None:
    """Learned tokens in another order give other logits: nothing between them and the head is blind to position."""
    network, x = model(), image(1, 3, 64, 64)
    with torch.no_grad():
        before = network(x)
        network.tokens.copy_(network.get_parameter("tokens").flip(-1))  # type: ignore[union-attr, operator]
        after = network(x)
    assert not torch.allclose(before, after, rtol=ROUNDING, atol=ROUNDING)


def test_every_image_token_hears_of_every_other() -> None:
    module = distinct(dualtoken_vit.PositionAwareTokens(16, heads=2, steps=1))
    x = image(1, 16, 14, 14).requires_grad_()
    heard, _ = module(x, torch.zeros(1, 16, 7, 7))
    heard[0, :, 0, 0].sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(1) > 0).all()


def test_attention_is_multi_head_attention() -> None:
    q, k, v = image(3, 2, 24, 5, 4).unbind()
    found = dualtoken_vit._attend(q, k, v, heads=3)
    heads = [part.reshape(2, 3, 8, 20).transpose(-2, -1) for part in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads).transpose(-2, -1).reshape(2, 24, 5, 4)
    torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 8, 10, 14])
def test_resizing_is_torchs_antialiased_interpolation(size: int) -> None:
    identity = torch.eye(size)[None, None]
    rows = dualtoken_vit.resizing_matrix(size, identity)
    expected = F.interpolate(identity, (7, size), mode="bilinear", antialias=True, align_corners=False)[0, 0]
    torch.testing.assert_close(rows, expected, rtol=ROUNDING, atol=ROUNDING)


def test_training_reaches_every_parameter() -> None:
    network = model().train()
    network(image(2, 3, 64, 64)).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("size", [(224, 224), (128, 160)])
def test_export_agrees_with_eager(size: tuple[int, int]) -> None:
    assert_exports(model(), image(1, 3, *size))


def test_checkpoint_tells_its_options() -> None:
    network = model(in_channels=1)
    options = dualtoken_vit.options_from_checkpoint(network.state_dict())
    assert options == {"num_classes": 7, "in_channels": 1}
    dualtoken_vit.build("dualtoken_vit_tiny", **options).load_state_dict(network.state_dict(), strict=True)  # type: ignore[arg-type]


def test_foreign_names_are_refused() -> None:
    with pytest.raises(CheckpointError, match="not a DualToken-ViT checkpoint"):
        dualtoken_vit.options_from_checkpoint({"head.weight": torch.zeros(7, 192)})
    with pytest.raises(UnknownNameError, match="dualtoken_vit_tiny"):
        dualtoken_vit.build("dualtoken_vit_base")
