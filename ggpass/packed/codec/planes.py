"""The bytes of an array's elements in planes, and back: each plane is coded on its own.

A float is rotated left by one bit first, so that the top byte holds exponent bits alone and the sign joins the
mantissa: weights then cost the entropy of their exponents, about 2.7 bits, plus their mantissas (as ZipNN found,
arXiv 2411.05239).
"""

import functools
from collections.abc import Callable

import numpy as np

from ggpass.packed.codec.native import address, check, library

#: Elements merged by one task: 2 MB of a float32 array, which stays in a core's cache.
BLOCK = 1 << 19


def split_planes(data: np.ndarray, width: int, rotate: bool) -> np.ndarray:
    """planes[b, i] = byte b, most significant first, of element i; (width, n) uint8 from (n·width,) uint8."""
    planes = np.empty((width, data.size // width), np.uint8)
    check(library().ggp_planes_split(address(data), planes.shape[1], width, rotate, address(planes)), "an array")
    return planes


def merge_tasks(planes: np.ndarray, rotate: bool, out: np.ndarray) -> list[Callable[[], None]]:
    """What inverts `split_planes` into `out`, (n·width,) uint8, a block of elements at a time, in any order."""
    width, count = planes.shape
    flat = planes.reshape(-1)

    def merge(start: int) -> None:
        n, first, into = min(BLOCK, count - start), flat[start:], out[start * width :]
        status = library().ggp_planes_merge(address(first), count, n, width, rotate, address(into))
        check(status, "a byte plane")

    return [functools.partial(merge, start) for start in range(0, count, BLOCK)]
