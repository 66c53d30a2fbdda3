"""Ranges that were observed before: of the same file, on the same samples, by the same observer.

To observe a model on 128 samples takes up to minutes, and an export is seldom the last. The ranges lie in the user's
cache folder, or in the one that `MOBILEMIX_CACHE` names, by a hash of all that they follow from. Whatever goes wrong
with the folder costs time and nothing else.
"""

import contextlib
import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import mobilemix
from mobilemix import files
from mobilemix.targets.base import Inputs

FOLDER = "MOBILEMIX_CACHE"
KEPT = 100
"""Entries of the folder; those that were used longest ago make room."""

Ranges = dict[str, tuple[float, float]]


def ranges(
    path: Path,
    samples: Sequence[Inputs],
    observer: str,
    symmetric: bool,
    compute: Callable[[], Mapping[str, tuple[float, float]]],
    *more: str,
) -> Ranges:
    """The range of each observed value, computed unless it was before.

    Args:
        path: float model whose values are observed; its bytes count, and those of a .data file beside it.
        samples: that they are observed on.
        observer: name in `mobilemix.quantization.observers.OBSERVERS`.
        symmetric: whether ranges are.
        compute: observes; ends by name of the value.
        more: what else the result depends on, such as the names of the values.
    """
    key = _key(path, samples, observer, str(symmetric), *more)
    entry = _folder() / f"{key}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        found = {str(name): (float(low), float(high)) for name, (low, high) in json.loads(entry.read_bytes()).items()}
        os.utime(entry)
        return found
    computed = {name: (float(low), float(high)) for name, (low, high) in compute().items()}
    with contextlib.suppress(OSError):
        _write(entry, json.dumps(computed))
    return computed


def digest(samples: Sequence[Inputs]) -> str:
    """SHA-256 of samples: of their names, dtypes, shapes and values."""
    total = hashlib.sha256()
    for sample in samples:
        for name, value in sample.items():
            total.update(f"{name} {value.dtype.str} {value.shape}\n".encode())
            total.update(value.tobytes())
    return total.hexdigest()


def _key(path: Path, samples: Sequence[Inputs], *more: str) -> str:
    weights = path.with_suffix(".data")
    contents = [files.sha256(each) for each in (path, weights) if each.exists()]
    # Observers are part of it as they are written, so that no version of theirs answers for another.
    code = [files.sha256(Path(__file__).with_name(name)) for name in ("observers.py", "affine.py", "drift.py")]
    parts = (mobilemix.__version__, *code, *contents, digest(samples), *more)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _folder() -> Path:
    """Where this system keeps what may be lost."""
    if chosen := os.environ.get(FOLDER):
        return Path(chosen)
    with contextlib.suppress(RuntimeError):  # no home
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "mobilemix"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "mobilemix")
    return Path(os.devnull)


def _write(entry: Path, content: str) -> None:
    """Write one entry whole, and remove the oldest beyond `KEPT`."""
    entry.parent.mkdir(parents=True, exist_ok=True)
    draft = entry.with_suffix(f".{secrets.token_hex(4)}")
    try:
        draft.write_text(content, encoding="utf-8")
        draft.replace(entry)
    finally:
        draft.unlink(missing_ok=True)
    entries = sorted(entry.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)
    for outdated in entries[:-KEPT]:
        outdated.unlink(missing_ok=True)
