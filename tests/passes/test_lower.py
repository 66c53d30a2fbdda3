"""All passes together, on whole blocks that mix tokens with Fourier transforms, and on every backbone."""

import collections

import pytest
import torch
from passes_checks import TOLERANCE, assert_real, operators, relative_error, widened
from torch import Tensor, nn
from zoo_fourier import AFNO, FNet, GFNetBlock, LongConvolution, SpectralConvolution

from mobilemix.capture import capture
from mobilemix.errors import UnsupportedOpError
from mobilemix.models import registry
from mobilemix.passes import PASSES, lower

SMALLEST = ("affnet_et", "casvit_xs", "efficientvim_m1", "dualtoken_vit_tiny")
SMALL_INPUT = 64
FLOAT64_TOLERANCE = 1e-14
BACKBONE_TOLERANCE = 1e-5
"""Deep networks with new weights amplify rounding; eager float32 is no closer to float64."""

ARITHMETIC = ("conv1d", "conv2d", "linear", "batch_norm", "mul", "div", "add")
ARITHMETIC_LEFT: dict[str, dict[str, int]] = {
    "affnet_et": {"conv1d": 0, "conv2d": 70, "linear": 1, "batch_norm": 0, "mul": 36, "div": 0, "add": 38},
    "casvit_xs": {"conv1d": 0, "conv2d": 145, "linear": 1, "batch_norm": 0, "mul": 50, "div": 0, "add": 40},
    "efficientvim_m1": {"conv1d": 12, "conv2d": 54, "linear": 1, "batch_norm": 0, "mul": 37, "div": 0, "add": 34},
    "dualtoken_vit_tiny": {"conv1d": 0, "conv2d": 168, "linear": 19, "batch_norm": 0, "mul": 122, "div": 0, "add": 156},
}
"""What is left of it in each backbone with new weights, every product and sum of two values included."""


BLOCKS = {
    "AFNO": (AFNO(8, 2, 0.5), (2, 8, 10, 8)),
    "AFNO, all frequencies": (AFNO(8, 2, 1.0), (1, 6, 6, 8)),
    "GFNet": (GFNetBlock(6, 7, 5), (2, 35, 6)),
    "FNet": (FNet(), (2, 12, 10)),
    "FNO": (SpectralConvolution(4, 3), (2, 4, 9, 10)),
    "long convolution": (LongConvolution(3, 20), (2, 3, 20)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(name: str) -> None:
    module, shape = BLOCKS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    passes: list[str] = []
    program = lower(capture(module, (x,)), log=passes.append)
    assert "complex_to_real" in passes
    assert_real(program)
    assert relative_error(program, module, x) < TOLERANCE
    assert not {"slice_scatter", "select_scatter", "copy", "einsum", "softshrink"} & set(operators(program))
    ranks = [node.meta["val"].dim() for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)]
    assert max(ranks) <= 5, "Core ML has no more"


def test_a_static_spectrum_is_computed_beforehand() -> None:
    module, shape = BLOCKS["long convolution"]
    program = lower(capture(module, (torch.randn(shape),)))
    found = operators(program)
    assert found["mm"] + found["matmul"] == 2, "one for the input's transform, one for the way back"


def test_the_frequency_filter_of_affnet_is_two_convolutions() -> None:
    model = registry.build(registry.find("affnet_et"))
    block = model.layer_4[1].global_rep[0].filter  # type: ignore[union-attr,index]
    x = torch.randn(1, 104, 16, 16, generator=torch.Generator().manual_seed(0))
    program = lower(capture(block, (x,)))
    assert_real(program)
    assert relative_error(program, block, x) < TOLERANCE
    found = operators(program)
    assert (found["conv2d"], found["mm"] + found["matmul"], found["einsum"]) == (2, 4, 0)


def test_passes_that_changed_something_are_named_in_order() -> None:
    module, shape = BLOCKS["AFNO"]
    said: list[str] = []
    lower(capture(module, (torch.randn(shape),)), log=said.append)
    order = iter(step.name for step in PASSES)
    assert all(name in order for name in said), "a subsequence of the passes"
    assert {"complex_to_real", "lower_einsum", "lower_softshrink"} <= set(said)


def test_only_the_passes_given_are_run() -> None:
    module, shape = BLOCKS["FNet"]
    program = capture(module, (torch.randn(shape),))
    assert lower(program, ()) is program


def test_a_lowered_program_has_nothing_left_to_lower() -> None:
    module, shape = BLOCKS["GFNet"]
    program = lower(capture(module, (torch.randn(shape),)))
    said: list[str] = []
    assert lower(program, log=said.append) is program
    assert said == []


@pytest.mark.parametrize("name", BLOCKS)
def test_a_program_in_float64_stays_exact(name: str) -> None:
    module, shape = BLOCKS[name]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        program = lower(torch.export.export(widened(module), (x,)).run_decompositions({}))
    assert_real(program)
    assert relative_error(program, module, x) < FLOAT64_TOLERANCE


def test_dynamic_shapes_are_refused() -> None:
    program = torch.export.export(nn.ReLU(), (torch.randn(4, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with pytest.raises(UnsupportedOpError, match="dynamic shapes"):
        lower(program)


def _check_backbone(name: str, size: int, **options: bool) -> collections.Counter[str]:
    model = registry.build(registry.find(name), **options)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    program = lower(capture(model, (x,)))
    assert_real(program)
    found = operators(program)
    assert not {"softshrink", "einsum", "dropout"} & set(found)
    assert relative_error(program, model, x) < BACKBONE_TOLERANCE
    return found


@pytest.mark.parametrize("name", SMALLEST)
def test_smallest_backbones(name: str) -> None:
    found = _check_backbone(name, SMALL_INPUT)
    assert {op: found[op] for op in ARITHMETIC} == ARITHMETIC_LEFT[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", registry.list_models())
def test_every_backbone(name: str) -> None:
    _check_backbone(name, registry.find(name).input_size)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["distillation", "features_only"])
@pytest.mark.parametrize("name", SMALLEST)
def test_other_forms(name: str, option: str) -> None:
    if option == "distillation" and not name.startswith(("casvit", "efficientvim")):
        pytest.skip("has no such form")
    _check_backbone(name, registry.find(name).input_size, **{option: True})
