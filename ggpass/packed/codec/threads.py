"""run_all: independent tasks on a number of threads; the native loops release the GIL while they run."""

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


@functools.cache
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    # Kept: starting threads takes as long as decoding a small tensor. Idle ones wait without spinning. A forked child
    # has another process id, and so a pool of its own: the parent's threads do not exist there.
    return ThreadPoolExecutor(threads, thread_name_prefix="ggpass-codec")


def run_all(tasks: Iterable[Callable[[], T]], threads: int) -> list[T]:
    """Return the results of the tasks in order. Tasks must not call this themselves.

    If one raises, or the caller is interrupted, no task runs any more when this raises: the caller is free to
    overwrite the file that they read.
    """
    tasks = list(tasks)
    if threads <= 1 or len(tasks) <= 1:
        return [task() for task in tasks]
    pool = _pool(threads, os.getpid())
    futures = [pool.submit(task) for task in tasks]
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
