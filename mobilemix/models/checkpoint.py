"""Weights from files that nobody has to trust: safetensors, and torch files read without running pickled code."""

import hashlib
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from mobilemix.errors import CheckpointError

# Averaged weights come first: they are what published accuracies are measured with.
_WRAPPERS = (
    *("model_ema", "state_dict_ema", "ema_state_dict", "ema_model_state_dict", "ema"),
    *("model_state_dict", "state_dict", "model", "module"),
)
_MODULE_PREFIX = "module."  # DataParallel, DistributedDataParallel, AveragedModel
_COMPILED_PREFIX = "_orig_mod."  # torch.compile
_AVERAGE_COUNT = "n_averaged"  # a buffer of AveragedModel beside the weights

_CORRUPT = "not a checkpoint, or a corrupt one; fetch or save it again"
_BATCH_COUNT = "num_batches_tracked"
_SHOWN = 3  # names or groups of names that a message lists


class _Inert:
    """Stands for an object that training scripts store beside the weights; takes any state and keeps none."""

    def __new__(cls, *_: object) -> "_Inert":
        return object.__new__(cls)

    def __init__(self, *_: object) -> None:
        """Take the arguments of whatever this stands for."""

    def __setstate__(self, state: object) -> None:
        """Drop the state."""


# Classes that torch's restricted unpickler refuses although training scripts store them beside the weights.
# Each name is bound to a harmless stand-in, so the named code itself is never reached.
_STAND_INS: tuple[tuple[Callable[..., Any], str], ...] = (
    (OrderedDict, "yacs.config.CfgNode"),  # a dict, and the unpickler fills exact dict types alone
    (_Inert, "argparse.Namespace"),
    (_Inert, "pathlib.PosixPath"),
    (_Inert, "numpy.dtype"),
    (_Inert, "numpy.ndarray"),
    (_Inert, "numpy.core.multiarray.scalar"),
    (_Inert, "numpy._core.multiarray.scalar"),
    (_Inert, "numpy.core.multiarray._reconstruct"),
    (_Inert, "numpy._core.multiarray._reconstruct"),
)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The named tensors of a checkpoint, on the CPU, in the dtypes of the file.

    Reads safetensors and torch files (zip and legacy), told apart by content. Wrappers as training scripts write
    them (`model`, `state_dict`, `model_ema`, …, nested or not) are opened; where a file holds plain and averaged
    (EMA) weights, the averaged ones are taken. Optimizer state and everything else beside the weights is ignored.
    The prefixes `module.` and `_orig_mod.` are removed.

    Raises:
        CheckpointError: the file is missing, unreadable, corrupt, empty of tensors, or holds pickled code.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: no such checkpoint")
        if not path.is_file():
            raise CheckpointError(f"{path}: not a file; give a safetensors or torch checkpoint")
        content = safetensors.torch.load_file(path) if _is_safetensors(path) else _load_torch(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: corrupt safetensors file ({error}); fetch or save it again") from error
    state_dict = _unwrap(content)
    if not state_dict:
        raise CheckpointError(f"{path}: holds no named tensors; save the model's state_dict()")
    return _without_prefixes(state_dict)


def _is_safetensors(path: Path) -> bool:
    # A safetensors file opens with the length of its header in eight bytes, then the header's JSON.
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{" or path.suffix == ".safetensors"


def _load_torch(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(list(_STAND_INS)), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except pickle.UnpicklingError as error:
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path}: holds pickled code, which is never run ({refused[1]}); save the model's state_dict()"
            ) from error
        raise CheckpointError(f"{path}: {_CORRUPT}") from error
    except Exception as error:  # corrupt files surface as any of a dozen types, from RuntimeError to UnicodeDecodeError
        if "TorchScript" in str(error):
            raise CheckpointError(f"{path}: a TorchScript archive; save the model's state_dict()") from error
        raise CheckpointError(f"{path}: {_CORRUPT}") from error


def _unwrap(content: Any) -> dict[str, Tensor]:
    """The tensors of the innermost wrapper, by preference; of `content` itself where it has none."""
    if not isinstance(content, Mapping):
        return {}
    for wrapper in _WRAPPERS:
        if found := _unwrap(content.get(wrapper)):
            return found
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _without_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # A compiled submodule leaves its prefix in the middle of a name; `module.` may be a name of the model's own there.
    names = {name.replace(_COMPILED_PREFIX, ""): value for name, value in state_dict.items()}
    while (weights := names.keys() - {_AVERAGE_COUNT}) and all(name.startswith(_MODULE_PREFIX) for name in weights):
        names = {name.removeprefix(_MODULE_PREFIX): names[name] for name in names if name != _AVERAGE_COUNT}
    return names


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], source: str) -> None:
    """Copies `state_dict` into `model`: every name, every shape, cast to the model's dtypes.

    `num_batches_tracked` buffers are left alone on both sides: nothing reads them at inference. `source` names the
    checkpoint in messages. On an error the model is unchanged.

    Raises:
        CheckpointError: names, shapes or kinds of number differ; says which in one line.
    """
    own, given = _without_counters(model.state_dict()), _without_counters(state_dict)
    missing = [name for name in own if name not in given]
    unexpected = [name for name in given if name not in own]
    differing = [
        f"{name} is {_describe(given[name], tensor)}, the model has {_describe(tensor, given[name])}"
        for name, tensor in own.items()
        if name in given and not _fits(given[name], tensor)
    ]
    faults = [
        *([f"missing {_summary(missing, given)}"] if missing else []),
        *([f"unexpected {_summary(unexpected, own)}"] if unexpected else []),
        *differing[:_SHOWN],
        *([f"{len(differing) - _SHOWN} more tensors differ"] if len(differing) > _SHOWN else []),
    ]
    if faults:
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(faults)}")
    model.load_state_dict(given, strict=False)


def _without_counters(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state_dict.items() if name.rpartition(".")[2] != _BATCH_COUNT}


def _fits(source: Tensor, target: Tensor) -> bool:
    return source.shape == target.shape and _kind(source) == _kind(target)


def _kind(tensor: Tensor) -> str:
    # Copying within a kind only rounds; across kinds it would drop imaginary parts or quantisation scales.
    return "complex" if tensor.is_complex() else "floating" if tensor.is_floating_point() else "integer"


def _describe(tensor: Tensor, other: Tensor) -> str:
    shape = str(tuple(tensor.shape))
    return shape if _kind(tensor) == _kind(other) else f"{_kind(tensor)} {shape}"


def _summary(names: Collection[str], others: Collection[str]) -> str:
    """Shortest useful list of `names`: whole subtrees that `others` lacks are counted, single names are printed."""
    present = {name[:end] for name in others for end, letter in enumerate(name) if letter == "."}
    groups: dict[str, list[str]] = {}
    for name in names:
        ends = (end for end, letter in enumerate(name) if letter == "." and name[:end] not in present)
        groups.setdefault(name[: next(ends, len(name))], []).append(name)
    parts = [
        members[0] if len(members) == 1 else f"{len(members)} keys under {subtree}.*"
        for subtree, members in groups.items()
    ]
    rest = sum(len(members) for members in list(groups.values())[_SHOWN:])
    return ", ".join(parts[:_SHOWN]) + (f" and {rest} more" if rest else "")


def fingerprint(module: nn.Module) -> str:
    """SHA-256 in hexadecimal over names, dtypes, shapes and bytes of the state dict's tensors, by name."""
    digest = hashlib.sha256()
    state: dict[str, Any] = module.state_dict()  # some modules add more than tensors to it
    for name, tensor in sorted((name, value) for name, value in state.items() if isinstance(value, Tensor)):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
