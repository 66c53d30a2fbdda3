"""Stand-ins for packages that need CUDA, so that repositories which import them load, run and export anywhere.

    with mobilemix.shims.shim("mamba"):
        from models.vmamba import VSSM

`mamba` stands in for mamba_ssm, causal_conv1d, the compiled scans of VMamba's line, triton (importable, its kernels
cannot run) and `torch.cuda.device` of a tensor on the CPU. Scans become `torch.ops.mobilemix.selective_scan` and
`ssd_chunk_scan`, one node each in a captured graph. For evaluation: gradients flow, but the modules' step-by-step
decoding does not exist. docs/shims.md lists the repositories that were tried.

A package that is installed and can be imported is used as it is, but for what runs on a GPU alone: compiled scans and
the triton kernels of mamba_ssm, or of a fork of it, are stood in for even where they are installed. This module is read
without torch.
"""

import importlib
import importlib.util
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from mobilemix.errors import UnknownNameError
from mobilemix.shims.table import FILES, GPU_ONLY, MAMBA, NEEDS, SHIMS, TRITON

__all__ = ["SHIMS", "TRITON", "missing_packages", "shim"]

_made: dict[str, ModuleType] = {}
"""Every stand-in is made once, so that its classes are the same each time a shim is entered."""


@contextmanager
def shim(*names: str) -> Iterator[None]:
    """Make the packages of the named shims importable; afterwards `sys.modules` holds none of the stand-ins.

    It may be entered again, and within itself. With no names it does nothing.

    Args:
        *names: keys of `SHIMS`.

    Raises:
        UnknownNameError: no such shim.
        ImportError: on import, of a name that the stand-in does not offer.
    """
    for name in names:
        if name not in SHIMS:
            raise UnknownNameError("shim", name, SHIMS)
    packages = tuple(package for name in names for package in SHIMS[name])
    if not packages:
        yield
        return
    before = set(sys.modules)
    replaced: set[str] = set()
    # Last, so that what is really there is found before; but first in place of what is there and cannot be imported.
    with _forgiving_torch(), _on_path(_Finder(packages), len(sys.meta_path)), _on_path(_Finder(replaced), 0):
        for package in packages:
            is_there = _is_there(package)
            is_usable = is_there and package not in GPU_ONLY and (package in FILES or _imports(package))
            if package == TRITON or not is_usable:  # its kernels run on a GPU alone, too, wherever it imports
                replaced.update(module for module, needed in NEEDS.items() if needed == package)
            if is_there and not is_usable:
                replaced.add(package)
        try:
            yield
        finally:
            for name in set(sys.modules) - before:
                if sys.modules[name] is _made.get(name):
                    del sys.modules[name]


@contextmanager
def missing_packages() -> Iterator[list[str]]:
    """Collect which of the packages that the shims cover are asked for and not there, while the block runs."""
    recorder = _Recorder()
    with _on_path(recorder, len(sys.meta_path)):
        yield recorder.missing


@contextmanager
def _on_path(finder: MetaPathFinder, position: int) -> Iterator[None]:
    sys.meta_path.insert(position, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Finder(MetaPathFinder, Loader):
    """Finds the stand-ins of some packages and modules."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        package = fullname.partition(".")[0]
        if package not in self.names and fullname not in self.names:
            return None
        if package == TRITON:
            # torch looks for triton to compile with it: what is found must not be a stub.
            return None if _importer().partition(".")[0] == "torch" else ModuleSpec(fullname, self, is_package=True)
        if fullname not in MAMBA:
            valid = [name for name in MAMBA if name.startswith(package)]
            raise ModuleNotFoundError(str(UnknownNameError("module of mobilemix:", fullname, valid)), name=fullname)
        is_package = any(name.startswith(f"{fullname}.") for name in MAMBA)
        return ModuleSpec(fullname, self, is_package=is_package)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _made.setdefault(spec.name, ModuleType(spec.name, "A stand-in of mobilemix."))

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        if name.partition(".")[0] == TRITON:
            stub = importlib.import_module("mobilemix.shims.triton_stub")
            vars(module).update(stub.NAMES if name == TRITON else {}, __getattr__=stub.placeholder)
        else:
            vars(module).update(_resolve(MAMBA[name]), __getattr__=_refusal(name))


class _Recorder(MetaPathFinder):
    def __init__(self) -> None:
        self.missing: list[str] = []

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> None:
        package = fullname.partition(".")[0]
        is_ours = any(package in packages for packages in SHIMS.values())
        if is_ours and package not in self.missing and _importer().partition(".")[0] != "torch":
            self.missing.append(package)


def _resolve(offer: Mapping[str, str]) -> dict[str, Any]:
    found = {}
    for name, place in offer.items():
        module, _, attribute = place.partition(":")
        found[name] = getattr(importlib.import_module(f"mobilemix.shims.{module}"), attribute)
    return found


def _refusal(module: str) -> Any:
    def __getattr__(name: str) -> Any:  # noqa: N807 -- a module's own hook (PEP 562)
        if name.startswith("__") or f"{module}.{name}" in MAMBA:  # what Python asks for, and modules yet to be imported
            raise AttributeError(name)
        # ImportError, which is what repositories guard their imports against.
        raise ImportError(str(UnknownNameError(f"name in mobilemix's {module}:", name, MAMBA[module])))

    return __getattr__


def _importer() -> str:
    """Name of the module that runs the import statement which is being resolved."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith("importlib") and name != __name__:
            return name
    return ""


def _is_there(package: str) -> bool:
    """Whether anything but a stand-in answers to the name."""
    if package in sys.modules:
        return sys.modules[package] is not _made.get(package)
    spec = importlib.util.find_spec(package)
    return spec is not None and not isinstance(spec.loader, _Finder)


def _imports(package: str) -> bool:
    """Whether the import works; what it leaves behind if not is removed."""
    before = set(sys.modules)
    try:
        importlib.import_module(package)
    except Exception:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == package:
                del sys.modules[name]
        return False
    return True


@contextmanager
def _forgiving_torch() -> Iterator[None]:
    """Let pass what means something on a GPU alone, or in eager mode alone.

    `with torch.cuda.device(tensor.device)` does nothing for a tensor on the CPU. A subclass of Tensor that adds methods
    only, made of a tensor that is being traced, is that tensor.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils import _triton

    # What looks for triton once and remembers, must have looked before there is a stub of it.
    _triton.has_triton_package()
    importlib.import_module("torch.export._trace")
    device = torch.cuda.device

    class Device(device):  # type: ignore[misc, valid-type]
        def __new__(cls, which: Any) -> Any:
            if which is None:
                on_cpu = not torch.cuda.is_available()
            else:
                on_cpu = isinstance(which, torch.device | str) and torch.device(which).type == "cpu"
            return nullcontext() if on_cpu else super().__new__(cls)

    def make(cls: type, *values: Any, **options: Any) -> Any:
        if len(values) == 1 and isinstance(values[0], FakeTensor):
            return values[0]
        return torch.Tensor.__new__(cls, *values, **options)

    adopted: list[Any] = []

    def adopt(cls: Any, /, **_: Any) -> None:
        if cls.__module__.partition(".")[0] != "torch" and not {"__new__", "__torch_dispatch__"} & vars(cls).keys():
            cls.__new__ = make
            adopted.append(cls)

    torch.cuda.device = Device  # type: ignore[misc, assignment]
    for subclass in torch.Tensor.__subclasses__():
        adopt(subclass)
    tensor: Any = torch.Tensor
    outer = vars(torch.Tensor).get("__init_subclass__")
    tensor.__init_subclass__ = classmethod(adopt)
    try:
        yield
    finally:
        torch.cuda.device = device  # type: ignore[misc]
        if outer is None:
            del tensor.__init_subclass__
        else:
            tensor.__init_subclass__ = outer
        for cls in adopted:
            del cls.__new__
