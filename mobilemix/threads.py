"""Independent evaluations side by side: on small tensors, kernels on all cores mostly wait for one another."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def spread(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """`[function(item) for item in items]`, one item per core at a time, with kernels of one thread.

    Grad mode, autocast and the like are those of a new thread, so the function has to set them itself.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(items))
    if workers < 2:
        return [function(item) for item in items]
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers) as pool:
            return list(pool.map(function, items))
    finally:
        torch.set_num_threads(threads)
