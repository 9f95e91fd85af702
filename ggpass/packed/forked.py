"""after_fork: torch on one thread in a forked child, in which the threads that its parent started do not exist."""

import contextlib
import os
from collections.abc import Iterator

import torch

_IMPORTED_IN = os.getpid()


@contextlib.contextmanager
def after_fork() -> Iterator[None]:
    """Let torch compute on one thread inside, if this process is a forked child: its thread pool would wait for ever.

    Use it as a decorator of what reads or writes files.
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
