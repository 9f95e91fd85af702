"""run_all: independent tasks on a number of threads; the native loops release the GIL while they run."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def run_all(tasks: Iterable[Callable[[], T]], threads: int) -> list[T]:
    """The results of the tasks in order; the first error stops them all."""
    tasks = list(tasks)
    if threads <= 1 or len(tasks) <= 1:
        return [task() for task in tasks]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda task: task(), tasks))
