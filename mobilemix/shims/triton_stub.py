"""A triton that can be imported: kernels are defined, and say what is wrong when they are run."""

from types import SimpleNamespace
from typing import Any

from mobilemix.errors import UnsupportedOpError


class Kernel:
    """What `triton.jit` makes of a function."""

    def __init__(self, function: Any) -> None:
        """Keep its name."""
        self.name = getattr(function, "name", getattr(function, "__name__", "a function"))

    def __getitem__(self, grid: object) -> "Kernel":
        """A launch over a grid."""
        return self

    def __call__(self, *arguments: object, **options: object) -> Any:  # noqa: ARG002
        """Refuse to run.

        Raises:
            UnsupportedOpError: always.
        """
        raise UnsupportedOpError(
            f"the triton kernel {self.name} needs a GPU, and mobilemix has no stand-in for it;"
            " switch the model to its PyTorch path"
        )


class Placeholder:
    """Any other name of triton: it has every attribute, and calling it does nothing."""

    def __getattr__(self, name: str) -> "Placeholder":
        """Another one, but for what Python itself asks for."""
        return placeholder(name)

    def __call__(self, *arguments: object, **options: object) -> "Placeholder":  # noqa: ARG002
        """Itself: annotations and constants of kernels are written so."""
        return self


def placeholder(name: str) -> Placeholder:
    """A placeholder for an attribute."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Placeholder()


def _jit(function: Any = None, **options: object) -> Any:
    return _decorator(**options) if function is None else Kernel(function)


def _decorator(*arguments: object, **options: object) -> Any:  # noqa: ARG001
    return Kernel


def _config(kwargs: Any = None, num_warps: int = 4, num_stages: int = 2, **options: object) -> SimpleNamespace:
    return SimpleNamespace(kwargs=kwargs, num_warps=num_warps, num_stages=num_stages, **options)


NAMES = {
    "__version__": "3.0.0",
    "Config": _config,
    "autotune": _decorator,
    "cdiv": lambda x, y: -(-x // y),
    "heuristics": _decorator,
    "jit": _jit,
    "next_power_of_2": lambda n: 1 << (n - 1).bit_length(),
}
"""What `triton` itself offers besides placeholders."""
