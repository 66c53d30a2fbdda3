import pytest
import torch

from mobilemix.errors import InputError
from mobilemix.models.common import HEAD_INIT_STD, check_image, linear_head


def test_images_pass() -> None:
    check_image(torch.zeros(2, 3, 1, 7), 3)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 1, 8, 8), (1, 4, 8, 8), (1, 3, 0, 8), (1, 3, 8, 0), (1, 3, 8, 8, 8)])
def test_anything_else_is_refused_in_one_line(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as error:
        check_image(torch.zeros(shape), 3)
    assert str(error.value).endswith(f"got {shape}")
    assert "\n" not in str(error.value)


def test_new_heads_start_small_and_without_bias() -> None:
    torch.manual_seed(0)
    head = linear_head(64, 1000)
    assert head.weight.std().item() == pytest.approx(HEAD_INIT_STD, rel=0.05)
    assert not head.bias.any()
