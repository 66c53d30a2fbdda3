import models_fidelity
import pytest
import torch

from mobilemix.errors import CheckpointError, InputError, UnknownNameError
from mobilemix.models import affnet

EXPORT_TOLERANCE = 1e-5


@pytest.mark.parametrize("variant", affnet.VARIANTS)
def test_matches_the_authors_implementation(variant: str) -> None:
    models_fidelity.check(affnet.build(variant), variant)


@pytest.mark.parametrize("norm", affnet.NORMS)
def test_checkpoint_tells_the_options_it_was_built_with(norm: affnet.Norm) -> None:
    model = affnet.build("affnet_et", num_classes=7, in_channels=1, norm=norm)
    options = affnet.options_from_checkpoint(model.state_dict())
    assert options == {"norm": norm, "num_classes": 7, "in_channels": 1}
    affnet.build("affnet_et", **options).load_state_dict(model.state_dict(), strict=True)  # type: ignore[arg-type]


def test_batch_norm_replaces_every_norm_of_the_filter_blocks() -> None:
    model = affnet.build("affnet_et", norm="batch")
    assert not any(isinstance(module, torch.nn.GroupNorm) for module in model.modules())


def test_foreign_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"classifier\.fc\.weight"):
        affnet.options_from_checkpoint({})


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UnknownNameError, match="affnet_et"):
        affnet.build("affnet_xl")
    with pytest.raises(UnknownNameError, match="layer"):
        affnet.build("affnet_et", norm="instance")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(1, 1), (33, 47), (64, 96)])
def test_any_input_size_runs(size: tuple[int, int]) -> None:
    model = affnet.build("affnet_et", num_classes=5).eval()
    with torch.no_grad():
        logits = model(torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (1, 5)
    assert logits.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 0, 64)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="expected an image"):
        affnet.build("affnet_et")(torch.zeros(shape))


def test_features_are_the_five_stages() -> None:
    model = affnet.build("affnet_t", features_only=True).eval()
    with torch.no_grad():
        maps = model(torch.zeros(1, 3, 64, 64))
    assert [tuple(features.shape) for features in maps] == [
        (1, 32, 32, 32),
        (1, 48, 16, 16),
        (1, 96, 8, 8),
        (1, 160, 4, 4),
        (1, 192, 2, 2),
    ]


def test_filter_sees_the_whole_map() -> None:
    torch.manual_seed(0)
    mixer = affnet.AdaptiveFrequencyFilter(64)
    torch.nn.init.normal_(mixer.b2)  # a mask well above the shrinkage threshold
    x = torch.randn(1, 64, 8, 8, requires_grad=True)
    mixer(x)[0, :, 0, 0].sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().sum(1) > 0).all()


def test_export_agrees_with_eager() -> None:
    torch.manual_seed(0)
    model = affnet.build("affnet_et", num_classes=5).eval()
    x = torch.randn(1, 3, 64, 64)
    program = torch.export.export(model, (x,), strict=False)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(program.module()(x), expected, rtol=EXPORT_TOLERANCE, atol=EXPORT_TOLERANCE)
