"""run_all: independent tasks on a number of threads; the native loops release the GIL while they run."""

import functools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    # Kept: starting threads takes as long as decoding a small tensor. Idle ones wait without spinning.
    return ThreadPoolExecutor(threads, thread_name_prefix="ggpass-codec")


def run_all(tasks: Iterable[Callable[[], T]], threads: int) -> list[T]:
    """The results of the tasks in order. Tasks must not call this themselves."""
    tasks = list(tasks)
    if threads <= 1 or len(tasks) <= 1:
        return [task() for task in tasks]
    return list(_pool(threads).map(lambda task: task(), tasks))
