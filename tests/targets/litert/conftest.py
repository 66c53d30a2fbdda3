from pathlib import Path

import pytest

from mobilemix.targets import is_installed

if not is_installed("litert"):
    collect_ignore_glob = ["*.py", "passes/*.py"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("litert")
