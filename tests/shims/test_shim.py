"""The context manager: what is importable inside, what is left outside, and what is really installed."""

import importlib
import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils import _triton

from mobilemix import shims
from mobilemix.capture import capture
from mobilemix.errors import UnknownNameError, UnsupportedOpError
from mobilemix.shims import missing_packages, shim
from mobilemix.shims.table import MAMBA

OURS = {package for packages in shims.SHIMS.values() for package in packages}


def left():
    """Modules of the packages that the shims cover."""
    return [name for name in sys.modules if name.partition(".")[0] in OURS]


@pytest.fixture(autouse=True)
def _clean():
    finders = list(sys.meta_path)
    yield
    assert left() == []
    assert sys.meta_path == finders


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Write packages as they would be installed: {path: text}."""

    def write(files):
        for path, text in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        importlib.invalidate_caches()

    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield write
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("module", MAMBA)
def test_every_module_imports_and_offers_what_the_table_says(module):
    with shim("mamba"):
        found = importlib.import_module(module)
        for name in MAMBA[module]:
            assert getattr(found, name) is not None
        parent, _, last = module.rpartition(".")
        assert not parent or getattr(importlib.import_module(parent), last) is found
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(module)


def test_classes_are_the_same_each_time():
    with shim("mamba"):
        from mamba_ssm import Mamba

        with shim("mamba"):
            from mamba_ssm.modules.mamba_simple import Mamba as inner
        assert "mamba_ssm" in sys.modules  # the outer one's
    with shim("mamba"):
        from mamba_ssm import Mamba as again
    assert Mamba is inner is again


def test_no_names_is_no_shim():
    with shim(), pytest.raises(ModuleNotFoundError):
        importlib.import_module("mamba_ssm")


def test_an_unknown_shim_is_explained():
    with pytest.raises(UnknownNameError, match="unknown shim 'mambo'; did you mean 'mamba'. Valid: mamba, triton"):
        shim("mambo").__enter__()


def test_it_is_removed_after_an_error():
    with pytest.raises(ZeroDivisionError), shim("mamba"):
        importlib.import_module("mamba_ssm")
        1 / 0  # noqa: B018


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (
            "from mamba_ssm.modules.mamba_simple import BiMamba",
            "name in mobilemix's mamba_ssm.modules.mamba_simple: 'BiMamba'; did you mean 'Mamba'? Valid: Block, Mamba",
        ),
        ("from mamba_ssm import thing", "unknown name in mobilemix's mamba_ssm: 'thing'. Valid: Mamba, "),
        ("import mamba_ssm.modules.mamba7", "'mamba_ssm.modules.mamba7'; did you mean 'mamba_ssm.modules.mamba2'?"),
        ("from causal_conv1d.nowhere import f", "unknown module of mobilemix: 'causal_conv1d.nowhere'"),
        ("from selective_scan_cuda import bwd", "unknown name in mobilemix's selective_scan_cuda: 'bwd'"),
    ],
)
def test_a_name_that_is_not_there_is_one_clear_import_error(statement, message):
    with shim("mamba"), pytest.raises(ImportError) as error:
        exec(statement)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_guards_of_imports_work():
    with shim("mamba"):
        try:
            from mamba_ssm.modules.mamba_simple import BiMamba
        except ImportError:
            BiMamba = None
    assert BiMamba is None


REAL = {
    "mamba_ssm/__init__.py": "REAL = True\n",
    "mamba_ssm/ops/__init__.py": "",
    "mamba_ssm/ops/selective_scan_interface.py": "selective_scan_fn = 'real'\n",
}


def test_a_real_package_is_not_shadowed(packages):
    packages(REAL)
    with shim("mamba"):
        import mamba_ssm
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        assert mamba_ssm.REAL
        assert selective_scan_fn == "real"
        import causal_conv1d  # the rest is stood in for

        assert causal_conv1d.causal_conv1d_fn
    importlib.import_module("mamba_ssm")  # and it stays


def test_a_real_package_that_cannot_import_is_replaced(packages):
    packages({**REAL, "mamba_ssm/__init__.py": "import mamba_ssm.ops, no_such_cuda_library\n"})
    packages({"selective_scan_cuda.py": "raise ImportError('libcudart.so.12: cannot open shared object file')\n"})
    with shim("mamba"):
        import selective_scan_cuda
        from mamba_ssm import Mamba

        assert selective_scan_cuda.fwd
        assert isinstance(Mamba(8), nn.Module)
    assert not left()


def test_what_runs_on_a_gpu_alone_is_stood_in_for_even_where_it_is_installed(packages):
    """As on the machine that trained the model."""
    interface = "import selective_scan_cuda\nfwd = selective_scan_cuda.fwd\n"
    packages(
        {
            **REAL,
            "mamba_ssm/ops/selective_scan_interface.py": interface,
            "mamba_ssm/ops/triton/__init__.py": "",
            "mamba_ssm/ops/triton/layer_norm.py": "RMSNorm = 'a kernel for GPUs'\n",
            "selective_scan_cuda.py": "fwd = 'compiled'\n",
            "causal_conv1d_cuda.py": "",
            "causal_conv1d/__init__.py": "causal_conv1d_fn = 'compiled'\n",
            "triton/__init__.py": "REAL = True\n",
        }
    )
    with shim("mamba"):
        import mamba_ssm
        import triton
        from causal_conv1d import causal_conv1d_fn
        from mamba_ssm.ops.selective_scan_interface import fwd
        from mamba_ssm.ops.triton.layer_norm import RMSNorm

        assert mamba_ssm.REAL
        assert triton.REAL
        assert "compiled" not in (fwd, causal_conv1d_fn)
        assert RMSNorm(4)(torch.ones(1, 4)).shape == (1, 4)


def test_files_of_a_repository_are_not_run_to_see_whether_they_can_be(packages):
    packages({"selective_scan.py": "1 / 0\n", "csm_triton.py": "MINE = True\n"})
    with shim("mamba"):
        from csm_triton import MINE
    assert MINE
    del sys.modules["csm_triton"]


def test_a_fork_keeps_its_layers_and_takes_our_kernels(packages):
    """As Vision Mamba's: a mamba_ssm of its own, whose norms need triton and whose extras need old transformers."""
    packages(
        {
            "mamba_ssm/__init__.py": "from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel\n",
            "mamba_ssm/models/__init__.py": "",
            "mamba_ssm/models/mixer_seq_simple.py": "from transformers.generation import NoLongerThere\n",
            "mamba_ssm/modules/__init__.py": "",
            "mamba_ssm/modules/mamba_simple.py": "from mamba_ssm.ops.triton.layer_norm import RMSNorm\nOWN = RMSNorm\n",
            "mamba_ssm/ops/__init__.py": "",
            "mamba_ssm/ops/triton/__init__.py": "",
            "mamba_ssm/ops/triton/layer_norm.py": "import triton\nRMSNorm = 'a kernel for GPUs'\n",
        }
    )
    with shim("mamba"):
        from mamba_ssm.modules.mamba_simple import OWN

        assert OWN(4)(torch.ones(1, 4)).shape == (1, 4)
    for name in [name for name in sys.modules if name.startswith("mamba_ssm")]:
        assert sys.modules.pop(name).__file__  # only what is really there stayed


def test_triton_imports_but_does_not_run(packages):
    packages(
        {
            "kernels_of_a_user.py": """
import triton
import triton.language as tl
from triton.language.extra import libdevice

BLOCK = tl.constexpr(16)

@triton.autotune(configs=[triton.Config({"BLOCK": 2**i}, num_warps=2) for i in range(3)], key=["n"])
@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % 2 == 0})
@triton.jit
def add(x: tl.tensor, y, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    tl.store(x, tl.load(y) + libdevice.tanh(x))

@triton.jit(noinline=True)
def other(x):
    return x

def run(x):
    grid = (triton.cdiv(10, 4), triton.next_power_of_2(5))
    assert grid == (3, 8)
    add[grid](x, x, 10)
"""
        }
    )
    for name in shims.SHIMS:
        with shim(name):
            module = importlib.import_module("kernels_of_a_user")
            with pytest.raises(UnsupportedOpError, match="the triton kernel add needs a GPU"):
                module.run(torch.zeros(3))
        del sys.modules["kernels_of_a_user"]


def test_torch_does_not_take_the_stub_for_triton():
    """torch asks once, and compiles with what it finds."""
    for cached in (_triton.has_triton_package, _triton.get_triton_version):
        cached.cache_clear()
    with shim("mamba"):
        importlib.import_module("triton")
        assert not _triton.has_triton_package()
        del sys.modules["triton"]
        assert _triton.get_triton_version() == (0, 0)  # its own import


@pytest.mark.slow
def test_a_stub_that_is_there_when_torch_first_exports():
    code = (
        "from mobilemix.shims import shim\n"
        "with shim('mamba'):\n"
        "    import torch, triton\n"
        "    torch.export.export(torch.nn.ReLU(), (torch.zeros(1),))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_devices_of_tensors_on_the_cpu():
    device = torch.cuda.device
    with shim("mamba"):
        assert issubclass(torch.cuda.device, device)
        x = torch.ones(2)
        for which in (x.device, "cpu", None):
            with torch.cuda.device(which):
                x = x + 1
        assert x.sum() == 8
    assert torch.cuda.device is device


class Counted(torch.Tensor):
    """As VSSD's: a subclass that adds a property."""

    @property
    def elements(self):
        return self.numel()


class Subclassing(nn.Module):
    def forward(self, x):
        x = Counted(x * 2)
        return x + Counted(x).numel()


def test_a_subclass_of_tensor_is_captured():
    x = torch.ones(2, 3)
    own = "__new__" in vars(Counted)
    with shim("mamba"):
        assert isinstance(Counted(x), Counted)  # outside of a capture it is what it was
        program = capture(Subclassing(), (x,))
    assert torch.equal(program.module()(x), torch.full((2, 3), 8.0))
    assert ("__new__" in vars(Counted)) is own
    assert isinstance(Counted(x), Counted)


def test_missing_packages_are_collected_once_and_in_order():
    with missing_packages() as missing:
        for name in ("triton", "mamba_ssm.ops", "no_such_package", "triton.language"):
            with pytest.raises(ModuleNotFoundError):
                importlib.import_module(name)
    assert missing == ["triton", "mamba_ssm"]


def test_the_table_is_read_without_torch():
    code = "import sys, mobilemix.shims; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_by_name_survive_a_copy():
    """A module made inside is copied and saved outside."""
    import copy

    with shim("mamba"):
        from mamba_ssm import Mamba

        layer = Mamba(8)
    twin = copy.deepcopy(layer)
    x = torch.randn(1, 3, 8)
    assert torch.equal(twin(x), layer(x))
