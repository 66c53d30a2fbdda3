"""Writing without ever leaving half a file, and hashing what was written."""

import contextlib
import hashlib
import os
import secrets
import shutil
import socket
import zlib
from collections.abc import Iterator
from pathlib import Path

from mobilemix.errors import OutputError

_STAGING = ".mobilemix-"


@contextlib.contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """Yield an empty folder inside `folder`, on the same file system, that is gone when the block ends.

    Artifacts are made there and moved out whole with `replace`. What a killed process left in `folder` is removed.

    Raises:
        OutputError: the folder cannot be made or written, or the disk filled up inside the block.
    """
    # Named first and made inside the try, so that an interrupt finds no gap in which it would stay.
    stage = folder / f"{_prefix()}{os.getpid()}-{secrets.token_hex(4)}"
    try:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            stage.mkdir()
        except OSError as error:
            raise OutputError(f"cannot write to {folder}: {error.strerror}; choose another folder with -o") from error
        yield stage
    except OSError as error:
        raise OutputError(f"cannot write to {folder}: {error.strerror or error}; free some space, or see -o") from error
    except Exception as error:
        # Native writers (coremltools, onnx) report a full disk in words of their own; the free space says it plainly.
        if not isinstance(error, OutputError) and shutil.disk_usage(folder).free < 1_000_000:
            raise OutputError(f"cannot write to {folder}: no space left; free some, or see -o") from error
        raise
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def replace(source: Path, destination: Path) -> None:
    """Move a whole file or folder to `destination`; one that is there stays until the new one can take its place."""
    if not (source.is_dir() and destination.exists()):
        source.replace(destination)
        return
    # A folder cannot be renamed onto another, so the old one steps aside, whole and under a name that says what it is.
    previous = destination.with_name(f"{destination.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    destination.rename(previous)
    try:
        source.rename(destination)
    except OSError:
        previous.rename(destination)
        raise
    shutil.rmtree(previous)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, or of a folder's files with their relative names in sorted order."""
    digest = hashlib.sha256()
    for file in _files(path):
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def size(path: Path) -> int:
    """Bytes of a file, or of all the files in a folder."""
    return sum(file.stat().st_size for file in _files(path))


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _prefix() -> str:
    """Staging folders carry the host, because process numbers mean nothing on another one."""
    return f"{_STAGING}{zlib.crc32(socket.gethostname().encode()):08x}-"


def _sweep(folder: Path) -> None:
    """Remove staging folders of processes of this host that no longer run."""
    for left in folder.glob(f"{_prefix()}*"):
        owner = left.name.removeprefix(_prefix()).split("-")[0]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
