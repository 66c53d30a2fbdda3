"""Where a model comes from: the registry, or a factory in the user's own code."""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import site
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mobilemix import assets
from mobilemix.errors import CaptureError, InputError, UnknownNameError
from mobilemix.models import registry
from mobilemix.models.checkpoint import load_weights, read_state_dict
from mobilemix.preprocess import Preprocess
from mobilemix.recipe import Recipe
from mobilemix.shims import missing_packages, shim

AUTOMATIC = "mamba"
"""The shim that is tried where a model fails to load without."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that is ready to be captured, with what deploying it needs.

    Attributes:
        name: file names and metadata use it.
        module: eval mode; float32.
        input_shapes, input_dtypes: of the forward's positional arguments.
        preprocess: how an image becomes the input; None for a model whose input is no image.
        labels: file of the class names that fit if the number of classes does.
        weights: where they came from: "checkpoint", "shipped", "own" (set by the user's factory) or "random".
        metadata: author, license, description and the like for the artifact.
        shim: names of the shims that it was loaded with, and needs to be run.
        missing: packages that a shim covers, and that were asked for in vain while it was loaded without.
    """

    name: str
    module: nn.Module
    input_shapes: tuple[tuple[int, ...], ...]
    input_dtypes: tuple[str, ...]
    preprocess: Preprocess | None
    labels: Path
    weights: str
    metadata: Mapping[str, str]
    shim: tuple[str, ...]
    missing: tuple[str, ...] = ()


def load_source(recipe: Recipe, module: nn.Module | None = None) -> Source:
    """The model that a recipe names; `module` is used in its place where a notebook already has one.

    A factory that fails where a package is missing that a shim stands in for is called again with the shim, and a line
    on standard error says so.

    Raises:
        UnknownNameError: no such model.
        CheckpointError: the recipe's weights cannot be read or do not fit.
        InputError: no shape for a model of the user's own, a factory that does not work, labels that do not fit.
    """
    if module is not None or AUTOMATIC in recipe.shim:
        return _load(recipe, module)
    modules = set(sys.modules)
    with missing_packages() as missing:
        try:
            return dataclasses.replace(_load(recipe, None), missing=tuple(missing))
        except CaptureError:
            if not missing:
                raise
    # What was imported without the shim may have settled for less than the shim offers.
    for name in set(sys.modules) - modules:
        if _is_users(sys.modules[name]):
            del sys.modules[name]
    source = _load(dataclasses.replace(recipe, shim=(*recipe.shim, AUTOMATIC)), None)
    verb = "is" if len(missing) == 1 else "are"
    note = f"{' and '.join(missing)} {verb} not installed; using mobilemix's implementation (--shim {AUTOMATIC})"
    sys.stderr.write(f"note: {note}\n")
    return source


def _load(recipe: Recipe, module: nn.Module | None) -> Source:
    # Weights that are drawn rather than loaded must be the same ones when the artifact is verified later.
    with torch.random.fork_rng(devices=()), shim(*recipe.shim):
        torch.manual_seed(0)
        if module is not None:
            return _own(recipe, recipe.model, module.eval())
        if ":" in recipe.model:
            return _own(recipe, recipe.model.rpartition(":")[2], _call_factory(recipe.model))
        if recipe.model.endswith(".py") or "/" in recipe.model:
            raise InputError(f"'{recipe.model}' names a file but no factory; give {recipe.model}:FUNCTION_OR_CLASS")
        return _registered(recipe)


def _registered(recipe: Recipe) -> Source:
    spec = registry.find(recipe.model)
    shapes = recipe.input_shapes or ((1, 3, spec.input_size, spec.input_size),)
    if len(shapes) != 1 or len(shapes[0]) != 4:
        given = ", ".join("x".join(map(str, shape)) for shape in shapes)
        example = f"1x3x{spec.input_size}x{spec.input_size}"
        raise InputError(f"{spec.name} takes one input of 4 dimensions, such as {example}, not {given}")
    dtypes = _dtypes(recipe, shapes)
    if dtypes != ("float32",):
        raise InputError(f"{spec.name} takes images, which are float32, not {dtypes[0]}")
    _, channels, height, width = shapes[0]
    options = {} if channels == 3 else {"in_channels": channels}
    module = registry.create_model(spec.name, weights=recipe.weights, **options)
    mean, std = recipe.mean or spec.mean, recipe.std or spec.std
    preprocess = Preprocess(height, width, mean, std, spec.crop_pct) if len(mean) == channels else None
    family = spec.family
    metadata = {
        "author": f"{family.title} authors; exported by mobilemix",
        "license": "weights: see their publisher; code: Apache-2.0",
        "description": f"{family.title} ({spec.variant}), arXiv:{family.paper}",
    }
    weights = "checkpoint" if recipe.weights else "shipped" if spec.weights else "random"
    labels = assets.path(spec.labels)
    return Source(spec.name, module, shapes, dtypes, preprocess, labels, weights, metadata, recipe.shim)


def _own(recipe: Recipe, name: str, module: nn.Module) -> Source:
    if not recipe.input_shapes:
        raise InputError("a model of your own needs the shape of its input, such as --input 1x3x224x224")
    if recipe.weights:
        load_weights(module, read_state_dict(recipe.weights), str(recipe.weights))
    shape, dtypes = recipe.input_shapes[0], _dtypes(recipe, recipe.input_shapes)
    is_image = dtypes == ("float32",) and len(shape) == 4 and shape[1] in (1, 3)
    preprocess = None
    if recipe.mean and not is_image:
        raise InputError("mean and std apply to a model with one image input, Nx1xHxW or Nx3xHxW")
    if recipe.mean and len(recipe.mean) != shape[1]:
        raise InputError(f"mean and std have {len(recipe.mean)} values, but the input has {shape[1]} channels")
    if is_image:
        # Pixels in [0, 1] unless the user says otherwise.
        mean, std = recipe.mean or (0.0,) * shape[1], recipe.std or (1.0,) * shape[1]
        preprocess = Preprocess(shape[2], shape[3], mean, std)
    labels, weights = assets.path(registry.IMAGENET_LABELS), "checkpoint" if recipe.weights else "own"
    metadata = {"description": name}
    return Source(name, module, recipe.input_shapes, dtypes, preprocess, labels, weights, metadata, recipe.shim)


def _dtypes(recipe: Recipe, shapes: tuple[tuple[int, ...], ...]) -> tuple[str, ...]:
    return recipe.input_dtypes or ("float32",) * len(shapes)


def _call_factory(reference: str) -> nn.Module:
    """Import `path/to/file.py:factory` or `package.module:factory` and call the factory without arguments."""
    location, _, attribute = reference.rpartition(":")
    module = _import_file(Path(location)) if location.endswith(".py") else _import_module(location)
    try:
        factory = getattr(module, attribute)
    except AttributeError:
        valid = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise UnknownNameError(f"factory in {location}", attribute, valid) from None
    if isinstance(factory, nn.Module):
        return factory.eval()
    if not callable(factory):
        raise InputError(f"{reference} is a {type(factory).__name__}; it must be a function, a class or an nn.Module")
    required = [
        parameter.name
        for parameter in inspect.signature(factory).parameters.values()
        if parameter.default is parameter.empty and not parameter.kind.name.startswith("VAR_")
    ]
    if required:
        raise InputError(f"{reference} needs arguments ({', '.join(required)}); give a factory that takes none")
    model: Any = _run_users_code(reference, factory)
    if not isinstance(model, nn.Module):
        raise InputError(f"{reference} returned a {type(model).__name__}; it must return an nn.Module")
    return model.eval()


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As `python file.py` would have it: its folder first on the path, and found by name (dataclasses look there).
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules.setdefault(path.stem, module)
    _run_users_code(str(path), functools.partial(spec.loader.exec_module, module))
    return module


def _import_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    module: ModuleType = _run_users_code(name, functools.partial(importlib.import_module, name))
    return module


def _is_users(module: ModuleType) -> bool:
    """Whether a module is of the user's own files: neither installed nor of Python itself."""
    file = getattr(module, "__file__", None)
    installed = (sysconfig.get_path("stdlib"), *site.getsitepackages(), site.getusersitepackages())
    return file is not None and not any(Path(file).is_relative_to(folder) for folder in installed)


def _run_users_code(what: str, call: Callable[[], Any]) -> Any:
    """Call the user's code; what it raises becomes one line that says where."""
    try:
        return call()
    except Exception as error:
        frame = error.__traceback__
        while frame is not None and frame.tb_next is not None:
            frame = frame.tb_next
        where = f" ({frame.tb_frame.f_code.co_filename}:{frame.tb_lineno})" if frame else ""
        raise CaptureError(f"{what} raised {type(error).__name__}: {error}{where}") from error
