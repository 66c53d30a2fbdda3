"""Each peer's own virtual environment, made with pip on first use."""

import hashlib
import os
import subprocess
import sys
import threading
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]

BASE = ("torch==2.13.0", "numpy==2.4.6", "safetensors==0.8.0")
"""What every environment has: the model, and arrays. It is installed once; the others see it and add their own."""

_ONNX = ("onnxruntime==1.32.0", "onnx==1.23.2", "onnxscript==0.7.2")
_LITERT = ("litert-torch==0.10.0", "ai-edge-litert==2.3.0")

ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "pytorch": (),
    "onnxruntime": _ONNX,
    "onnxsim": (*_ONNX, "onnxsim==0.8.1"),
    "onnxslim": (*_ONNX, "onnxslim==0.1.98"),
    "openvino": ("openvino==2026.4.1", "packaging==25.0"),
    "ncnn": ("ncnn==1.0.20261020", "pnnx==20261020"),
    "litert": _LITERT,
    "executorch": ("executorch==1.5.1",),
    "mobilemix": ("-e", str(ROOT), *_ONNX, "onnxsim==0.8.1"),
    "mobilemix-litert": ("-e", f"{ROOT}[litert]", *_ONNX, "onnxsim==0.8.1", *_LITERT),
}
"""Environment → what pip is told to install into it; a new pin makes a new environment."""


class InstallError(Exception):
    """An environment that cannot be made; the message is pip's last line."""


def python(name: str, folder: Path) -> Path:
    """The interpreter of an environment, which is made if it is not there; raises InstallError."""
    with _ONE_AT_A_TIME:
        base = _make("base", BASE, folder, None)
        return _make(name, ENVIRONMENTS[name], folder, base) if ENVIRONMENTS[name] else base


_ONE_AT_A_TIME = threading.Lock()


def _make(name: str, requirements: tuple[str, ...], folder: Path, base: Path | None) -> Path:
    digest = hashlib.sha256("\n".join((sys.version, *BASE, *requirements)).encode()).hexdigest()[:10]
    home = folder / f"{name}-{digest}"
    interpreter = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = home / "installed"
    if done.exists():
        return interpreter
    venv.create(home, with_pip=True, clear=True)
    if base is not None:
        (_packages(interpreter) / "base.pth").write_text(f"{_packages(base)}\n")
    if requirements:
        command = [str(interpreter), "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *requirements]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        (home / "pip.log").write_text(result.stdout + result.stderr)
        if result.returncode:
            raise InstallError((result.stderr.strip().splitlines() or ["pip failed"])[-1])
    done.touch()
    return interpreter


def _packages(interpreter: Path) -> Path:
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([str(interpreter), "-c", code], text=True).strip())
