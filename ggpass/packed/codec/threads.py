"""run_all: independent tasks on a number of threads; after_fork: torch on one. Native loops release the GIL."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")

_IMPORTED_IN = os.getpid()


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


@contextlib.contextmanager
def after_fork() -> Iterator[None]:
    """Let torch compute on one thread inside, if this process is a forked child.

    The threads that its parent started do not exist there, so that torch's pool would wait for ever. Use
    it as a decorator of what reads or writes files.
    """
    threads = torch.get_num_threads()
    if os.getpid() == _IMPORTED_IN or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
