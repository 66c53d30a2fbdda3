import argparse
import hashlib
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mobilemix.errors import CheckpointError
from mobilemix.models import checkpoint

WEIGHTS = {"stem.weight": torch.arange(6.0).reshape(2, 3), "stem.bias": torch.ones(2)}
AVERAGED = {name: tensor + 1 for name, tensor in WEIGHTS.items()}


def saved(content: Any, path: Path, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_are_known_by_content(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    safetensors.torch.save_file(WEIGHTS, path)
    assert_equal(checkpoint.read_state_dict(path), dict(sorted(WEIGHTS.items())))


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "content",
    [
        WEIGHTS,
        OrderedDict(WEIGHTS),
        {"model": WEIGHTS, "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}},
        {"state_dict": WEIGHTS, "epoch": 3, "loss": torch.tensor(0.5)},
        {"state_dict": {"model": {"module": WEIGHTS}}},
        {"model_state_dict": WEIGHTS},
        {"model": WEIGHTS, "model_ema": None},
        {"model": WEIGHTS, "ema": {"decay": 0.999, "shadow_params": [torch.zeros(2)]}},
        prefixed("module."),
        prefixed("_orig_mod."),
        prefixed("module._orig_mod."),
        prefixed("_orig_mod.module."),
        {"n_averaged": torch.tensor(7), **prefixed("module.")},
    ],
)
def test_wrappers_and_prefixes_are_opened(tmp_path: Path, content: Any, zipped: bool) -> None:
    path = saved(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    assert_equal(checkpoint.read_state_dict(path), WEIGHTS)


@pytest.mark.parametrize("key", ["model_ema", "state_dict_ema", "ema_state_dict", "ema"])
def test_averaged_weights_are_preferred(tmp_path: Path, key: str) -> None:
    path = saved({"model": WEIGHTS, "state_dict": WEIGHTS, key: {"module": AVERAGED}}, tmp_path / "weights.pth")
    assert_equal(checkpoint.read_state_dict(path), AVERAGED)


def test_prefix_inside_a_compiled_submodule_goes_and_a_name_of_the_models_own_stays(tmp_path: Path) -> None:
    content = {"module.backbone._orig_mod.weight": torch.ones(1), "head.module.weight": torch.ones(1)}
    names = checkpoint.read_state_dict(saved(content, tmp_path / "weights.pth"))
    assert list(names) == ["module.backbone.weight", "head.module.weight"]


def test_training_settings_beside_the_weights_do_not_matter(tmp_path: Path) -> None:
    settings = {"args": argparse.Namespace(lr=0.1, out=Path("runs")), "best": np.float64(81.5), "curve": np.zeros(3)}
    path = saved({"model": WEIGHTS, **settings}, tmp_path / "weights.pth")
    assert_equal(checkpoint.read_state_dict(path), WEIGHTS)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("content", [{"model": WEIGHTS, "extra": Payload()}, Payload(), nn.Linear(2, 2)])
def test_pickled_code_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, zipped: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = saved(content, tmp_path / "weights.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"weights\.pth: holds pickled code, which is never run \(\S+\)") as error:
        checkpoint.read_state_dict(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def torch_bytes(tmp_path: Path) -> bytes:
    return saved(WEIGHTS, tmp_path / "whole.pth").read_bytes()


def safetensors_bytes() -> bytes:
    return safetensors.torch.save(WEIGHTS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.pth", lambda folder: torch_bytes(folder)[:-100]),
        ("weights.pth", lambda folder: torch_bytes(folder)[:40]),
        ("weights.pth", lambda folder: np.random.RandomState(0).bytes(4096)),
        ("weights.pth", lambda folder: b""),
        ("weights.pth", lambda folder: b"<!DOCTYPE html><html>Not found</html>"),
        ("weights.safetensors", lambda folder: safetensors_bytes()[:-4]),
        ("weights.safetensors", lambda folder: safetensors_bytes()[:20]),
        ("weights.safetensors", lambda folder: np.random.RandomState(0).bytes(4096)),
        ("weights.safetensors", lambda folder: b""),
    ],
)
def test_corrupt_files_are_refused_in_one_line(tmp_path: Path, name: str, content: Any) -> None:
    path = tmp_path / name
    path.write_bytes(content(tmp_path))
    with pytest.raises(CheckpointError, match="corrupt") as error:
        checkpoint.read_state_dict(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole, path = torch_bytes(tmp_path), tmp_path / "weights.pth"
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            checkpoint.read_state_dict(path)


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.read_state_dict(tmp_path / "missing.pth")
    with pytest.raises(CheckpointError, match="not a file"):
        checkpoint.read_state_dict(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.read_state_dict(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [torch.ones(2)], torch.ones(2), {"model": {"loss": 1.0}}])
def test_files_without_named_tensors_are_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        checkpoint.read_state_dict(saved(content, tmp_path / "weights.pth"))


def test_torchscript_archives_are_refused(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "weights.pt"))
    with pytest.raises(CheckpointError, match="TorchScript"):
        checkpoint.read_state_dict(tmp_path / "weights.pt")


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3)) for _ in range(4)]
    return nn.Sequential(OrderedDict(network=nn.Sequential(*blocks), head=nn.Linear(3, 10)))


def message(state_dict: dict[str, Tensor]) -> str:
    model = network()
    before = checkpoint.fingerprint(model)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_weights(model, state_dict, "weights.pth")
    assert checkpoint.fingerprint(model) == before
    return str(error.value)


def test_a_matching_checkpoint_is_copied() -> None:
    source, model = network(), network()
    nn.init.normal_(source.get_submodule("head").weight)  # type: ignore[arg-type]
    assert checkpoint.fingerprint(source) != checkpoint.fingerprint(model)
    checkpoint.load_weights(model, source.state_dict(), "weights.pth")
    assert checkpoint.fingerprint(source) == checkpoint.fingerprint(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast_to_the_models(dtype: torch.dtype) -> None:
    model = network()
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    checkpoint.load_weights(model, weights, "weights.pth")
    assert model.get_parameter("head.weight").dtype == torch.float32
    torch.testing.assert_close(model.get_parameter("head.weight").to(dtype), weights["head.weight"], rtol=0, atol=0)


def test_missing_keys_are_grouped_by_the_subtree_that_is_missing() -> None:
    weights = {name: tensor for name, tensor in network().state_dict().items() if not name.startswith("network.3.")}
    del weights["head.bias"]
    assert message(weights) == "weights.pth does not fit the model: missing 5 keys under network.3.*, head.bias"


def test_unexpected_keys_are_grouped_and_counted() -> None:
    extra = {
        f"{branch}.{name}": torch.ones(1) for branch in ("aux1", "aux2", "aux3", "aux4") for name in ("a.w", "a.b")
    }
    found = message({**network().state_dict(), **extra})
    assert found == (
        "weights.pth does not fit the model: "
        "unexpected 2 keys under aux1.*, 2 keys under aux2.*, 2 keys under aux3.* and 2 more"
    )


def test_shapes_are_shown_side_by_side_and_only_the_first_few() -> None:
    weights = {**network().state_dict(), "head.weight": torch.ones(5, 3)}
    assert message(weights).endswith("model: head.weight is (5, 3), the model has (10, 3)")
    wider = {name: torch.ones(7) if tensor.dim() == 1 else tensor for name, tensor in weights.items()}
    assert message(wider).endswith("; 15 more tensors differ")


def test_kinds_of_number_are_not_mixed() -> None:
    weights = {**network().state_dict(), "head.weight": torch.ones(10, 3, dtype=torch.int8)}
    assert message(weights).endswith("head.weight is integer (10, 3), the model has floating (10, 3)")


def test_fingerprint_sees_names_dtypes_shapes_and_bytes() -> None:
    def of(**tensors: Tensor) -> str:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return checkpoint.fingerprint(module)

    zeros = torch.zeros(2, 2)
    prints = [
        of(a=zeros),
        of(b=zeros),
        of(a=zeros.reshape(4)),
        of(a=zeros.to(torch.int32)),
        of(a=zeros + torch.tensor([0.0, 0.0, 0.0, 1e-45]).reshape(2, 2)),
        of(a=zeros, b=zeros),
        of(a=torch.tensor(0.0)),
    ]
    assert len(set(prints)) == len(prints)
    assert of(a=zeros, b=zeros + 1) == of(b=zeros + 1, a=zeros.t().contiguous().t())
    assert of(a=zeros) == hashlib.sha256(b"a\0torch.float32\0(2, 2)\0" + bytes(16)).hexdigest()


def test_fingerprint_is_of_tensors_alone() -> None:
    class Versioned(nn.Linear):
        def get_extra_state(self) -> object:
            return {"version": 2}

    plain, versioned = nn.Linear(2, 2), Versioned(2, 2)
    versioned.load_state_dict(plain.state_dict(), strict=False)
    assert checkpoint.fingerprint(versioned) == checkpoint.fingerprint(plain)
