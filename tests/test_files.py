import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mobilemix import files
from mobilemix.errors import OutputError


def tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_staging_folder_is_gone_after_success_and_after_failure(tmp_path):
    with files.staging(tmp_path) as stage:
        (stage / "half").write_text("x")
        assert stage.parent == tmp_path
    assert tree(tmp_path) == []
    with pytest.raises(KeyError), files.staging(tmp_path) as stage:
        (stage / "half").write_text("x")
        raise KeyError
    assert tree(tmp_path) == []


def test_staging_makes_the_folder(tmp_path):
    with files.staging(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_holds_is_kept(tmp_path):
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = tmp_path / f"{files._prefix()}{int(child.stdout)}-x"
    alive = tmp_path / f"{files._prefix()}{os.getpid()}-x"
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "half").write_text("x")
    with files.staging(tmp_path):
        assert not dead.exists()
        assert (alive / "half").exists()


def test_a_file_where_the_folder_should_be_is_one_clear_error(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match=r"cannot write to .*out"), files.staging(tmp_path / "out"):
        pass


def test_an_unwritable_folder_is_one_clear_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    # Not by chmod: tests may run as root, who may write anywhere.
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OutputError, match="Permission denied"), files.staging(tmp_path):
        pass


def test_a_full_disk_is_one_clear_error(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write to .*No space left on device"), files.staging(tmp_path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert tree(tmp_path) == []


def test_a_full_disk_is_said_plainly_whatever_the_writer_says(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    with pytest.raises(OutputError, match="no space left"), files.staging(tmp_path):
        raise RuntimeError("blob writer: stream is bad")


@pytest.mark.parametrize("is_folder", [False, True])
def test_replace_puts_the_new_one_in_the_old_ones_place(tmp_path, is_folder):
    def make(path: Path, text: str) -> Path:
        if is_folder:
            path.mkdir()
            (path / "inner").write_text(text)
        else:
            path.write_text(text)
        return path

    old, new = make(tmp_path / "artifact", "old"), make(tmp_path / "new", "new")
    files.replace(new, old)
    assert ((old / "inner") if is_folder else old).read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_folder_that_cannot_be_moved_in_leaves_the_old_one(tmp_path, monkeypatch):
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "inner").write_text(folder.name)
    rename = Path.rename

    def fail(self, target):
        if self == new:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        files.replace(new, old)
    assert (old / "inner").read_text() == "old"


def test_the_hash_of_a_folder_depends_on_names_and_contents(tmp_path):
    def digest(**contents: str) -> str:
        folder = tmp_path / "folder"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, text in contents.items():
            (folder / name).write_text(text)
        return files.sha256(folder)

    assert digest(a="1", b="2") == digest(b="2", a="1")
    assert len({digest(a="1", b="2"), digest(a="2", b="1"), digest(a="1", c="2"), digest(a="12")}) == 4


def test_size_counts_every_file(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "a").write_bytes(b"123")
    (tmp_path / "b").write_bytes(b"4567")
    assert files.size(tmp_path) == 7
    assert files.size(tmp_path / "b") == 4
