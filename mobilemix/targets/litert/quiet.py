"""LiteRT's packages, without what they say to their own developers."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Python code logs, warns of and reports as progress off the terminal."""
    disabled, progress = logging.root.manager.disable, os.environ.get("LITERT_TORCH_SHOW_PROGRESS")
    os.environ["LITERT_TORCH_SHOW_PROGRESS"] = "n"
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if progress is None:
            del os.environ["LITERT_TORCH_SHOW_PROGRESS"]
        else:
            os.environ["LITERT_TORCH_SHOW_PROGRESS"] = progress


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Also keep what native code writes to standard error; for moments only, since it hides our progress, too."""
    sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        kept = os.dup(2)
        stack.callback(os.close, kept)
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123 -- a device, not a path of ours
            os.dup2(nowhere.fileno(), 2)
        stack.callback(os.dup2, kept, 2)
        yield


def load_converter() -> None:
    """Import litert-torch and what it brings, which takes seconds, before anybody waits for a line of it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # read once, when the library loads
    with silent():
        import litert_converter.mlir.ir  # noqa: F401
    with quiet():
        import litert_torch  # noqa: F401
