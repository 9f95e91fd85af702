"""counts[v] = #{i : symbols[i] = v}, exactly, for integers of any range; counted by native code."""

import numpy as np
import torch

from ggpass.ggd.grid import Histogram
from ggpass.packed.codec.native import address, integer_type, library

#: Distinct values counted by one pass over the array; what lies outside this window is sorted instead.
WINDOW = 1 << 16

#: Symbols looked at to place the window.
SAMPLE = 4096


def _count_window(symbols: np.ndarray, low: int, size: int) -> tuple[np.ndarray, int]:
    counts = np.zeros(size, dtype=np.uint64)
    outside = library().ggp_histogram(
        address(symbols),
        integer_type(symbols.dtype),
        symbols.size,
        low,
        size,
        address(counts),
    )
    return counts.astype(np.int64), outside


def histogram(symbols: np.ndarray) -> Histogram:
    """counts[v] = #{i : symbols[i] = v}.

    Args:
        symbols: contiguous, any integer dtype; values below 2^63.
    """
    symbols = symbols.reshape(-1)
    if symbols.size == 0:
        return _histogram(np.zeros(0, np.int64), np.zeros(0, np.int64))
    if symbols.dtype.itemsize == 1:
        counts, _ = _count_window(symbols.view(np.uint8), 0, 256)
        values = np.arange(256, dtype=np.uint8).view(symbols.dtype).astype(np.int64)
        order = np.argsort(values)
        values, counts = values[order], counts[order]
        return _histogram(values[counts > 0], counts[counts > 0])
    middle = int(np.median(symbols[:: max(1, symbols.size // SAMPLE)]))
    info = np.iinfo(symbols.dtype)
    low = max(int(info.min), middle - WINDOW // 2)
    size = min(WINDOW, int(info.max) - low + 1)
    counts, outside = _count_window(symbols, low, size)
    inside = np.flatnonzero(counts)
    values, counts = inside.astype(np.int64) + low, counts[inside]
    if outside:
        # Rare by the choice of the window, unless the symbols are no quantized weights at all.
        wide = symbols[(symbols < low) | (symbols > low + size - 1)].astype(np.int64)
        more, often = np.unique(wide, return_counts=True)
        values, counts = np.concatenate([values, more]), np.concatenate([counts, often])
        order = np.argsort(values)
        values, counts = values[order], counts[order]
    return _histogram(values, counts)


def _histogram(values: np.ndarray, counts: np.ndarray) -> Histogram:
    return Histogram(torch.from_numpy(values), torch.from_numpy(counts))
