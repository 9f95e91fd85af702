"""The static model of one array: which symbols get slots of the coder's table, how many, and which become patches.

A patch is a symbol stored aside, position and value, while its place in the stream takes the most frequent symbol. It
is the escape for rare large symbols: it costs nothing where there is none, and the decoder's inner loop never looks
for it.
"""

import heapq
from dataclasses import dataclass

import numpy as np
import torch

from ggpass.ggd.grid import Histogram
from ggpass.packed.codec import exp_golomb
from ggpass.packed.codec.native import address, integer_type, library

#: Distinct values counted by one pass over an array; what lies outside this window is sorted instead.
WINDOW = 1 << 16

#: Symbols looked at to place the window.
SAMPLE = 4096

#: log2 of the table sizes tried. 2^12 slots decode fastest (one look-up in 16 KB); larger ones serve low entropies
#: with long tails and large alphabets.
TABLE_BITS = (12, 14)

#: The smaller table is kept while it costs no more than this much above the larger one.
SLACK = 1.0025


def histogram(symbols: np.ndarray) -> Histogram:
    """counts[v] = #{i : symbols[i] = v}, exactly, for integers of any range; counted by native code.

    Args:
        symbols: contiguous, any integer dtype; values below 2^63.
    """
    symbols = symbols.reshape(-1)
    if symbols.dtype.itemsize == 1:
        counts, _ = _count_window(symbols.view(np.uint8), 0, 256)
        values = np.arange(256, dtype=np.uint8).view(symbols.dtype).astype(np.int64)
    else:
        info = np.iinfo(symbols.dtype)
        middle = int(np.median(symbols[:: max(1, symbols.size // SAMPLE)])) if symbols.size else 0
        low = max(int(info.min), middle - WINDOW // 2)
        size = min(WINDOW, int(info.max) - low + 1)
        counts, outside = _count_window(symbols, low, size)
        values = np.arange(size, dtype=np.int64) + low
        if outside:
            # Rare by the choice of the window, unless the symbols are no quantized weights at all.
            wide = symbols[(symbols < low) | (symbols > low + size - 1)].astype(np.int64)
            more, often = np.unique(wide, return_counts=True)
            values, counts = np.concatenate([values, more]), np.concatenate([counts, often])
    values, counts = values[counts > 0], counts[counts > 0]
    order = np.argsort(values)
    return Histogram(torch.from_numpy(values[order]), torch.from_numpy(counts[order]))


def _count_window(symbols: np.ndarray, low: int, size: int) -> tuple[np.ndarray, int]:
    counts = np.zeros(size, dtype=np.uint64)
    outside = library().ggp_histogram(
        address(symbols), integer_type(symbols.dtype), symbols.size, low, size, address(counts)
    )
    return counts.astype(np.int64), outside


@dataclass(frozen=True)
class Model:
    """values[i] owns frequencies[i] of 2^bits slots; every other symbol is a patch.

    Attributes:
        bits: log2 of the number of slots.
        values: (A,) int64, ascending, A ≥ 2.
        frequencies: (A,) uint32, each at least 1, summing to 2^bits.
        patches: how many symbols are patches.
        cost: the expected size of everything, in bits.
    """

    bits: int
    values: np.ndarray
    frequencies: np.ndarray
    patches: int
    cost: float

    @property
    def mode(self) -> int:
        """Return the index of the most frequent symbol, which stands in for patches."""
        return int(np.argmax(self.frequencies))


def normalize(counts: np.ndarray, slots: int) -> np.ndarray:
    """f = argmin −Σ counts·log2(f / slots) over integers f ≥ 1 that sum to `slots`; (A,) uint32.

    The cost is a sum of convex functions, so moving one slot at a time to where it saves most ends at the optimum.
    """
    share = counts * (slots / counts.sum())
    f = np.maximum(1, np.floor(share)).astype(np.int64)
    missing = slots - int(f.sum())
    step = 1 if missing > 0 else -1

    def change(i: int) -> tuple[float, int]:
        """Return how much the cost grows if symbol i gets `step` more slots."""
        fewer = f[i] + min(step, 0)
        return -step * counts[i] * np.log2((fewer + 1) / fewer), i

    heap = [change(i) for i in range(len(f)) if f[i] + step > 0]
    heapq.heapify(heap)
    for _ in range(abs(missing)):
        _, i = heapq.heappop(heap)
        f[i] += step
        if f[i] + step > 0:
            heapq.heappush(heap, change(i))
    return f.astype(np.uint32)


def _cut(counts: np.ndarray, patch_bits: np.ndarray, slots: int) -> int:
    """Return how many of the symbols, by falling count, get slots: argmin of the expected size."""
    total = counts.sum()
    limit = min(len(counts), slots // 2)
    share = np.maximum(counts / total, 1 / slots)[:limit]
    direct = np.cumsum(counts[:limit] * -np.log2(share)) + total * np.log2(np.maximum(1, np.cumsum(share)))
    table = 10.0 * np.arange(1, limit + 1)
    left = total - np.cumsum(counts[:limit])
    # A patch's value, the gap to it (near log2 of the mean gap, plus what the code wastes), and its stand-in.
    gap = np.log2(np.maximum(total, 1) / np.maximum(left, 1)) + 2 - np.log2(share[0])
    values = (counts * patch_bits).sum() - np.cumsum((counts * patch_bits)[:limit])
    cost = direct + table + left * gap + values
    cost[0] = np.inf  # a table needs two symbols
    return int(np.argmin(cost)) + 1


def fit(histogram: Histogram) -> Model:
    """Return the model of least expected size; the histogram holds at least two values."""
    all_values, all_counts = histogram.values.numpy(), histogram.counts.numpy()
    order = np.argsort(-all_counts, kind="stable")
    counts, values = all_counts[order], all_values[order]
    numbers = exp_golomb.signed_map(values)
    patch_bits = exp_golomb.lengths(numbers, exp_golomb.best_order(numbers[len(numbers) // 2 :]))
    best: Model | None = None
    for bits in TABLE_BITS:
        cut = _cut(counts, patch_bits, 1 << bits)
        kept = np.sort(order[:cut])
        weights = all_counts[kept]
        left = int(counts[cut:].sum())
        weights[np.argmax(weights)] += left
        frequencies = normalize(weights, 1 << bits)
        cost = float((weights * (bits - np.log2(frequencies))).sum()) + 10 * cut
        if left:
            cost += float((counts * patch_bits)[cut:].sum()) + left * (np.log2(counts.sum() / left) + 2)
        if best is None or cost * SLACK < best.cost:
            best = Model(bits, all_values[kept], frequencies, left, cost)
    if best is None:
        raise ValueError("TABLE_BITS is empty")
    return best
