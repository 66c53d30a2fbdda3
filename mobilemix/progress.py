"""How far the work is, told from wherever it is done to whoever listens, without every function passing it on."""

import contextlib
import contextvars
import threading
import time
from collections.abc import Callable, Iterator

PATIENCE = 2.0
"""Seconds before a count is told at all."""
INTERVAL = 0.1
"""Seconds between two counts."""

_stage: contextvars.ContextVar[Callable[[str], None] | None] = contextvars.ContextVar("stage", default=None)


@contextlib.contextmanager
def stage(name: str, listener: Callable[[str], None]) -> Iterator[None]:
    """Tell the listener that a stage begins; counts inside the block are told it with the stage's name in front."""
    listener(name)
    token = _stage.set(lambda count: listener(f"{name} · {count}" if count else name))
    try:
        yield
    finally:
        _stage.reset(token)


@contextlib.contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yield what is to be called, from any thread, with how many more of `total` are done; brief work is not told."""
    tell = _stage.get() or (lambda _count: None)
    lock = threading.Lock()
    done, due, told = 0, time.monotonic() + PATIENCE, False

    def step(count: int) -> None:
        nonlocal done, due, told
        with lock:
            done = min(done + count, total)
            if time.monotonic() >= due:
                tell(f"{what} {done} of {total}")
                due, told = time.monotonic() + INTERVAL, True

    yield step
    if told:
        tell("")
