from pathlib import Path

import pytest

from mobilemix import api
from mobilemix.recipe import Recipe


@pytest.fixture(scope="session")
def network_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network that all tests share, in a user's own file."""
    from conftest import NETWORK

    path = tmp_path_factory.mktemp("network") / "spectral_net.py"
    path.write_text(NETWORK)
    return path


@pytest.fixture(scope="session")
def recipe(network_file: Path) -> Recipe:
    """Of the network as a classifier of images."""
    return Recipe(
        model=f"{network_file}:make",
        target="tensorrt",
        input_shapes=((1, 3, 16, 16),),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
    )


@pytest.fixture(scope="session")
def prepared(recipe: Recipe) -> api.Prepared:
    """The network, captured and lowered once."""
    return api.prepare(recipe)
