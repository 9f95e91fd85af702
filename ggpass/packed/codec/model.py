"""The static model of one array: which symbols get slots of the coder's table, how many, and which become patches.

A patch is a symbol stored aside, position and value, while its place in the stream takes the most frequent symbol. It
is the escape for rare large symbols: it costs nothing where there is none, and the decoder's inner loop never looks
for it.
"""

import heapq
from dataclasses import dataclass

import numpy as np

from ggpass.ggd.grid import Histogram
from ggpass.packed.codec import exp_golomb

#: log2 of the table sizes tried. 2^12 slots decode fastest (one look-up in 16 KB); larger ones serve low entropies
#: with long tails and large alphabets.
TABLE_BITS = (12, 14)

#: The smaller table is kept while it costs no more than this much above the larger one.
SLACK = 1.0025


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
        """The index of the most frequent symbol, which stands in for patches."""
        return int(np.argmax(self.frequencies))


def normalize(counts: np.ndarray, slots: int) -> np.ndarray:
    """f = argmin −Σ counts·log2(f / slots) over integers f ≥ 1 that sum to `slots`; (A,) uint32.

    The cost is a sum of convex functions, so moving one slot at a time to where it saves most ends at the optimum.
    """
    share = counts * (slots / counts.sum())
    f = np.maximum(1, np.floor(share)).astype(np.int64)
    missing = slots - int(f.sum())
    if missing > 0:
        heap = [(-c * np.log2((n + 1) / n), i) for i, (c, n) in enumerate(zip(counts.tolist(), f.tolist()))]
        heapq.heapify(heap)
        for _ in range(missing):
            _, i = heapq.heappop(heap)
            f[i] += 1
            heapq.heappush(heap, (-counts[i] * np.log2((f[i] + 1) / f[i]), i))
    elif missing < 0:
        heap = [(c * np.log2(n / (n - 1)), i) for i, (c, n) in enumerate(zip(counts.tolist(), f.tolist())) if n > 1]
        heapq.heapify(heap)
        for _ in range(-missing):
            _, i = heapq.heappop(heap)
            f[i] -= 1
            if f[i] > 1:
                heapq.heappush(heap, (counts[i] * np.log2(f[i] / (f[i] - 1)), i))
    return f.astype(np.uint32)


def _cut(counts: np.ndarray, patch_bits: np.ndarray, slots: int) -> int:
    """How many of the symbols, by falling count, get slots: argmin of the expected size."""
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
    """The model of least expected size; the histogram holds at least two values."""
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
