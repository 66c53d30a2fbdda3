"""Files that ship in the wheel: checkpoints, labels and photographs; NOTICE.md and README.md name their sources."""

from importlib import resources
from pathlib import Path


def path(name: str) -> Path:
    """Where the asset called `name` is installed."""
    return Path(str(resources.files(__name__) / name))


def photographs() -> list[Path]:
    """The shipped photographs by their number, which mixes the classes: any five in a row show several."""
    return sorted(path("photographs").glob("*.jpg"), key=lambda photograph: int(photograph.stem.rpartition("_")[2]))
