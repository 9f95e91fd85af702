"""Lossless coding of any array: the bytes of its elements in planes, each plane coded on its own.

A float is rotated left by one bit first, so that the top byte holds exponent bits alone and the sign joins the
mantissa: weights then cost the entropy of their exponents, about 2.7 bits, plus their mantissas (as ZipNN found,
arXiv 2411.05239).
"""

import functools
from collections.abc import Callable

import numpy as np

from ggpass.errors import FormatError
from ggpass.packed.codec.decoder import Decoder
from ggpass.packed.codec.encoder import encode
from ggpass.packed.codec.native import address, check, library
from ggpass.packed.codec.threads import run_all

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


def merge_planes(planes: np.ndarray, rotate: bool, *, threads: int = 1) -> np.ndarray:
    """The bytes that `split_planes` was given, (n·width,) uint8 from (width, n) uint8."""
    out = np.empty(planes.size, np.uint8)
    run_all(merge_tasks(planes, rotate, out), threads)
    return out


def encode_planes(data: np.ndarray, width: int, rotate: bool, *, threads: int = 1) -> bytes:
    """The coded planes one after the other.

    Args:
        data: (n·width,) uint8, contiguous: the elements' own bytes.
        width: bytes of an element: 1, 2, 4 or 8.
        rotate: True for floats.
        threads: how many chunks to encode at a time.
    """
    return b"".join(encode(plane, threads=threads) for plane in split_planes(data, width, rotate))


def decode_planes(data: np.ndarray, count: int, width: int, rotate: bool, *, threads: int = 1) -> np.ndarray:
    """The bytes that `encode_planes` was given, (count·width,) uint8.

    Raises:
        FormatError: the planes are damaged or do not hold `count` elements.
    """
    decoders = []
    for plane in range(width):
        decoder = Decoder(data)
        if decoder.count != count or decoder.dtype != np.uint8:
            raise FormatError(f"byte plane {plane} holds {decoder.count} {decoder.dtype} instead of {count} bytes")
        decoders.append(decoder)
        data = data[decoder.container.length :]
    if data.size:
        raise FormatError(f"{data.size} bytes follow the last byte plane; fetch the file again")
    planes = np.empty((width, count), np.uint8)
    run_all([task for decoder, plane in zip(decoders, planes) for task in decoder.tasks(plane)], threads)
    return merge_planes(planes, rotate, threads=threads)
