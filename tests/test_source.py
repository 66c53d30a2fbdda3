import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mobilemix.errors import CaptureError, CheckpointError, InputError, MobilemixError, UnknownNameError
from mobilemix.recipe import Recipe
from mobilemix.source import load_source

SHAPE = ((1, 3, 8, 8),)
CODE = """
import torch
from torch import nn

SIZE = 3

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)

    def forward(self, image):
        return self.conv(image).mean((2, 3))

def make():
    return Net(5).train()

def needs(width):
    return Net(width)

def wrong():
    return "a string"

def broken():
    raise RuntimeError("no such\\nlayer")

ready = Net(6)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_net.py"
    path.write_text(CODE)
    yield path
    sys.modules.pop("my_net", None)


@pytest.mark.parametrize(("factory", "width"), [("make", 5), ("Net", 4), ("ready", 6)])
def test_a_function_a_class_or_a_module_of_the_users_file(file, factory, width):
    source = load_source(Recipe(model=f"{file}:{factory}", input_shapes=SHAPE))
    assert source.name == factory
    assert not source.module.training
    assert source.module(torch.zeros(SHAPE[0])).shape == (1, width)


def test_a_package_module_is_imported_from_the_working_folder(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_source(Recipe(model="my_net:make", input_shapes=SHAPE)).name == "make"


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        ("mke", UnknownNameError, "did you mean 'make'"),
        ("SIZE", InputError, "is a int"),
        ("needs", InputError, r"needs arguments \(width\)"),
        ("wrong", InputError, "returned a str"),
        ("broken", CaptureError, r"RuntimeError: no such\s+layer .*my_net.py:25"),
    ],
)
def test_a_factory_that_does_not_work_is_explained(file, factory, error, message):
    with pytest.raises(error, match=message):
        load_source(Recipe(model=f"{file}:{factory}", input_shapes=SHAPE))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("nowhere.py:make", "there is no file nowhere.py"),
        ("nowhere.py", "names a file but no factory"),
        ("no_such_package:make", "No module named 'no_such_package'"),
        ("afnet_t", "did you mean 'affnet_t'"),
    ],
)
def test_a_model_that_is_not_there_is_explained(model, message):
    with pytest.raises(MobilemixError, match=message):
        load_source(Recipe(model=model, input_shapes=SHAPE))


def test_a_file_that_does_not_even_parse_is_explained(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def make(:\n")
    with pytest.raises(CaptureError, match="SyntaxError"):
        load_source(Recipe(model=f"{path}:make", input_shapes=SHAPE))


def test_the_users_model_needs_a_shape(file):
    with pytest.raises(InputError, match="--input 1x3x224x224"):
        load_source(Recipe(model=f"{file}:make"))


def test_the_users_model_takes_weights(file, tmp_path):
    weights = {"conv.weight": torch.ones(5, 3, 3, 3), "conv.bias": torch.full((5,), 2.0)}
    save_file(weights, tmp_path / "w.safetensors")
    source = load_source(Recipe(model=f"{file}:make", input_shapes=SHAPE, weights=tmp_path / "w.safetensors"))
    assert torch.equal(source.module.conv.bias, weights["conv.bias"])
    with pytest.raises(CheckpointError, match="conv.weight"):
        load_source(Recipe(model=f"{file}:Net", input_shapes=SHAPE, weights=tmp_path / "w.safetensors"))


def test_the_users_images_are_in_0_to_1_unless_told_otherwise(file):
    model = f"{file}:make"
    assert load_source(Recipe(model=model, input_shapes=SHAPE)).preprocess.mean == (0.0, 0.0, 0.0)
    told = Recipe(model=model, input_shapes=SHAPE, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    assert load_source(told).preprocess.std == (1.0, 2.0, 3.0)
    assert load_source(Recipe(model=model, input_shapes=((1, 8),))).preprocess is None
    for shapes, message in (((1, 1, 8, 8),), "has 1 channels|but the input has 1"), (((1, 8),), "one image input"):
        with pytest.raises(InputError, match=message):
            load_source(Recipe(model=model, input_shapes=shapes, mean=(0.1,) * 3, std=(1.0,) * 3))


def test_a_module_in_hand_is_used_as_it_is():
    module = torch.nn.Linear(3, 2)
    source = load_source(Recipe(model="Linear", input_shapes=((1, 3),)), module)
    assert source.module is module
    assert source.name == "Linear"


def test_a_registry_model_brings_its_size_and_normalisation():
    source = load_source(Recipe(model="efficientvim_m1"))
    assert source.input_shapes == ((1, 3, 224, 224),)
    assert source.preprocess.mean == (0.485, 0.456, 0.406)
    assert Path(source.labels).name == "imagenet1k.txt"


def test_a_registry_model_takes_one_channel():
    source = load_source(Recipe(model="efficientvim_m1", input_shapes=((1, 1, 224, 224),)))
    assert source.module(torch.zeros(1, 1, 224, 224)).shape == (1, 1000)
    assert source.preprocess is None


@pytest.mark.parametrize("shapes", [((3, 224, 224),), ((1, 3, 224, 224), (1, 3))])
def test_a_shape_of_the_wrong_rank_is_explained(shapes):
    with pytest.raises(InputError, match="one input of 4 dimensions"):
        load_source(Recipe(model="efficientvim_m1", input_shapes=shapes))
