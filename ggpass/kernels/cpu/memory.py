"""Memory for codes: aligned to a cache line, and in huge pages where the system has them.

A matrix read once per token spends a tenth of its time on page-table walks in 4 KiB pages.
"""

from __future__ import annotations

import functools
import logging
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger("ggpass")

LINE_BYTES = 64
HUGE_BYTES = 2 << 20


def aligned_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return an uninitialized CPU tensor whose data starts on a 64-byte line; from 2 MiB on, in huge pages of 2 MiB.

    Where huge pages cannot be had, plain aligned memory is returned and the reason logged once.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size == 0:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    raw = _huge(size) if size >= HUGE_BYTES else None
    if raw is None:
        raw = torch.empty(size + LINE_BYTES, dtype=torch.uint8, device="cpu")
        raw = raw[-raw.data_ptr() % LINE_BYTES :][:size]
    return raw.view(dtype).view(tuple(shape))


def _huge(size: int) -> Tensor | None:
    """`size` bytes from an anonymous mapping that asks for huge pages; the tensor keeps the mapping alive."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        _say_why_not("this system has no MADV_HUGEPAGE")
        return None
    try:
        mapping = mmap.mmap(-1, size + HUGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        raw = torch.frombuffer(mapping, dtype=torch.uint8)
        start = -raw.data_ptr() % HUGE_BYTES
        # The last huge page would be paid for whole, however little of it is used: the rest stays in ordinary pages.
        mapping.madvise(mmap.MADV_HUGEPAGE, start, size // HUGE_BYTES * HUGE_BYTES)
    except OSError as error:
        _say_why_not(str(error))
        return None
    return raw[start:][:size]


@functools.cache
def _say_why_not(reason: str) -> None:
    logger.info("codes lie in ordinary pages: %s", reason)
