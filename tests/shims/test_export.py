"""From the command line to an artifact: `--shim`, recipes, manifests, and the shim that is found to be missing."""

import json
import sys
from pathlib import Path

import pytest

import mobilemix
from mobilemix.api import prepare
from mobilemix.errors import CaptureError, UnknownNameError
from mobilemix.manifest import read_manifest
from mobilemix.recipe import Recipe, load_recipe
from mobilemix.source import load_source

SHAPE = "1x6x8"
NOTE = "note: mamba_ssm is not installed; using mobilemix's implementation (--shim mamba)"
# A repository of two files: what the first one settles for without the package must not be kept.
LAYERS = """
import torch
from torch import nn
from norms import RMSNorm
from mamba_ssm import Mamba


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mixer = RMSNorm(8), Mamba(8, d_state=2)

    def forward(self, x):
        from mamba_ssm.ops.triton.layer_norm import rms_norm_fn  # while it runs, too
        with torch.cuda.device(x.device):
            return self.mixer(rms_norm_fn(x, self.norm.weight, None))


def make():
    print("as repositories do")
    return Net()


def broken():
    raise RuntimeError("no such layer")


def absent():
    from mamba_ssm.modules.mamba_simple import BiMamba
"""
NORMS = """
try:
    from mamba_ssm.ops.triton.layer_norm import RMSNorm
except ImportError:
    RMSNorm = None
"""


@pytest.fixture
def net(tmp_path, monkeypatch):
    """`file.py:` of the repository."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "layers.py").write_text(LAYERS)
    (folder / "norms.py").write_text(NORMS)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield f"{folder / 'layers.py'}:"
    for name in ("layers", "norms"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("target", "options"),
    [("onnx", ["--shim", "mamba"]), ("onnx", []), pytest.param("coreml", [], marks=pytest.mark.slow)],
)
def test_export_and_verify(command, net, tmp_path, options, target):
    code, out, err = command("export", f"{net}make", "--input", SHAPE, "-t", target, "-o", tmp_path, "--json", *options)
    assert code == 0, err
    assert (NOTE in err.splitlines()) is (not options)
    artifact = json.loads(out)[0]["path"]
    manifest = read_manifest(Path(artifact))
    assert manifest.recipe.shim == ("mamba",)
    assert manifest.parity["reference"] == "float64"
    sys.modules.pop("layers"), sys.modules.pop("norms")
    # The recipe knows, so nothing has to be found out again, and the weights are the same ones.
    code, out, err = command("verify", artifact)
    assert (code, NOTE in err) == (0, False), out
    assert "mamba_ssm" not in sys.modules


def test_in_python_and_in_a_recipe(net, tmp_path, capsys):
    exported = mobilemix.export(f"{net}make", target="onnx", input_shapes=((1, 6, 8),), shim="mamba", output=tmp_path)
    assert exported.parity.passed
    assert exported.manifest.recipe.shim == ("mamba",)
    assert capsys.readouterr().err == ""
    (tmp_path / "recipe.toml").write_text('shim = "mamba"\n')
    assert load_recipe(tmp_path / "recipe.toml").shim == ("mamba",)
    (tmp_path / "recipe.toml").write_text('shim = ["mamba", "triton"]\n')
    assert load_recipe(tmp_path / "recipe.toml").shim == ("mamba", "triton")


def test_a_module_in_hand_takes_the_shim_too(net):
    recipe = Recipe(model=f"{net}make", input_shapes=((1, 6, 8),), shim=("mamba",))
    module = load_source(recipe).module
    prepared = prepare(recipe, module=module)
    assert prepared.references["noise"].dtype == "float64"


def test_an_unknown_shim_is_one_line(command, tmp_path):
    code, _, err = command("export", "--shim", "mambo", "-o", tmp_path)
    assert code == 2
    assert err.strip() == "error: unknown shim 'mambo'; did you mean 'mamba'? Valid: mamba, triton"
    with pytest.raises(UnknownNameError, match="unknown shim 'x'"):
        Recipe(shim=("mamba", "x"))


def test_a_name_that_the_shim_has_not_is_one_line(command, net):
    code, _, err = command("export", f"{net}absent", "--input", SHAPE)
    assert code == 2
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1
    assert "unknown name in mobilemix's mamba_ssm.modules.mamba_simple: 'BiMamba'; did you mean 'Mamba'?" in lines[0]


def test_what_fails_for_other_reasons_is_not_tried_again(net, tmp_path, capsys):
    (tmp_path / "plain.py").write_text("def make():\n    raise RuntimeError('no such layer')\n")
    for model in (f"{tmp_path / 'plain.py'}:make", f"{net}broken"):
        with pytest.raises(CaptureError, match="RuntimeError: no such layer"):
            load_source(Recipe(model=model, input_shapes=((1, 6, 8),)))
    assert capsys.readouterr().err == ""
    sys.modules.pop("plain")


def test_a_model_that_loads_without_is_left_alone(tmp_path, capsys):
    """Its author has a way around the missing package, which is what is exported."""
    path = tmp_path / "guarded.py"
    path.write_text("from torch import nn\ntry:\n    import mamba_ssm\nexcept ImportError:\n    mamba_ssm = None\n")
    path.write_text(path.read_text() + "def make():\n    assert mamba_ssm is None\n    return nn.Identity()\n")
    source = load_source(Recipe(model=f"{path}:make", input_shapes=((1, 6, 8),)))
    assert source.shim == ()
    assert capsys.readouterr().err == ""
    sys.modules.pop("guarded")


def test_a_guarded_import_that_leaves_none_is_explained(command, tmp_path):
    path = tmp_path / "guarded.py"
    path.write_text("""
from torch import nn
try:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
except ImportError:
    selective_scan_fn = None

class Net(nn.Module):
    def forward(self, x):
        return selective_scan_fn(x)
""")
    code, _, err = command("export", f"{path}:Net", "--input", SHAPE)
    assert code == 2
    assert "'NoneType' object is not callable" in err
    assert err.strip().endswith("; mamba_ssm could not be imported: --shim mamba stands in")
    sys.modules.pop("guarded")
