import ctypes
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from tensorrt_graphs import needs_rtx

from mobilemix.errors import MissingDependencyError, TargetError
from mobilemix.targets.tensorrt import bindings


def _installed(monkeypatch: pytest.MonkeyPatch, folder: Path, libraries: str, version: str) -> None:
    """As if both packages of TensorRT for RTX were there, in these versions."""
    for stem in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"):
        (folder / f"{stem}.so.{libraries}").touch()
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)


def _module(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str) -> None:
    (folder / "tensorrt.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)


@pytest.mark.parametrize("flavour", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_package_names_its_extra(flavour: bindings.Flavour, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=rf"mobilemix\[{flavour}\]"):
        bindings.load(flavour)


def test_libraries_without_bindings_are_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    _installed(monkeypatch, tmp_path, "1.7.1", "")
    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(MissingDependencyError, match=bindings.RTX_BINDINGS):
        bindings.rtx_libraries()


def test_versions_of_the_two_packages_must_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, tmp_path, "1.7.1", "1.6.0.99")
    with pytest.raises(TargetError, match=r"1\.7\.1.*1\.6\.0\.99.*==1\.7\.\*"):
        bindings.rtx_libraries()


def test_patch_versions_may_differ_and_links_are_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, tmp_path, "1.7.1", "1.7.4.2")
    (tmp_path / "libtensorrt_rtx.so.1").touch()
    assert [path.name for path in bindings.rtx_libraries()] == [
        "libtensorrt_rtx.so.1.7.1",
        "libtensorrt_onnxparser_rtx.so.1.7.1",
    ]


def test_a_package_without_linux_libraries_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, tmp_path, "1.7.1", "1.7.1")
    for library in tmp_path.iterdir():
        library.unlink()
    with pytest.raises(TargetError, match="Linux only"):
        bindings.rtx_libraries()


def test_an_old_tensorrt_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(monkeypatch, tmp_path, "__version__ = '8.6.1'")
    with pytest.raises(TargetError, match=r"8\.6\.1 is too old; install 10 or newer"):
        bindings.tensorrt()


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0.106"])
def test_later_ones_are_taken(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(monkeypatch, tmp_path, f"__version__ = '{version}'")
    found = bindings.tensorrt()
    assert (found.name, found.version) == ("TensorRT", version)
    assert isinstance(found.module, ModuleType)


def test_one_that_does_not_load_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _module(monkeypatch, tmp_path, "raise ImportError('libnvinfer.so.11: cannot open shared object file')")
    with pytest.raises(TargetError, match="does not load: libnvinfer"):
        bindings.tensorrt()


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ctypes.CDLL:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    assert bindings.missing_gpu() == "no NVIDIA driver"


@pytest.mark.parametrize(
    ("status", "count", "expected"),
    [(0, 0, "no NVIDIA GPU"), (100, 0, "the NVIDIA driver reports error 100"), (0, 2, None)],
)
def test_the_driver_is_asked(status: int, count: int, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def counts(pointer: object) -> int:
        pointer._obj.value = count  # type: ignore[attr-defined]
        return 0

    driver = SimpleNamespace(cuInit=lambda flags: status, cuDeviceGetCount=counts)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    assert bindings.missing_gpu() == expected


@pytest.mark.parametrize(("status", "expected"), [(0, "NVIDIA H100"), (3, "an NVIDIA GPU")])
def test_the_gpu_has_a_name(status: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def name(buffer: Any, size: int, device: int) -> int:
        buffer.value = b"NVIDIA H100"
        return status

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(cuDeviceGetName=name))
    assert bindings.gpu_name() == expected


@needs_rtx
def test_rtx_loads_over_the_bundled_libraries() -> None:
    found = bindings.rtx()
    assert found.name == "TensorRT for RTX"
    assert found.version.split(".")[:2] == bindings.rtx_libraries()[0].name.split(".so.")[1].split(".")[:2]
    assert hasattr(found.module, "OnnxParser")
