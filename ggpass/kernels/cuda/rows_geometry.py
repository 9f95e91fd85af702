"""Which thread decodes which codes where rows are only decoded: plain arithmetic, as in `geometry`.

The unit is 16 bytes written: 8 codes for 16-bit outputs, 4 for float32, and one code where rows of outputs begin
anywhere. Neighbouring threads take neighbouring units, so that a warp reads and writes whole cache lines; with 16 codes
a thread each write would leave out every second 16 bytes. A thread has `PARTS` units, far apart, under way at a time.
"""

from __future__ import annotations

from ggpass.kernels.cuda.geometry import Number

THREADS = 128
PARTS = 4
#: Rows of one value of blockIdx.y, so that an index of a unit among them has 32 bits. Their units fill whole blocks.
PANEL = 2 * PARTS * THREADS
#: Values of blockIdx.y that a grid can have.
MOST_PANELS = 65535


def unit_index(block: Number, part: Number, thread: Number) -> Number:
    """A thread's part-th unit, among those of a panel."""
    return (block * PARTS + part) * THREADS + thread


def row_of_unit(index: Number, panel: Number, units: Number) -> Number:
    """The row of outputs, of `units` units each, that a unit lies in."""
    return panel * PANEL + index // units


def start_of_unit(index: Number, units: Number, size: int) -> Number:
    """k of its first code."""
    return index % units * size


def exists(index: Number, panel: Number, units: Number, rows: Number) -> Number:
    """Does the output have the unit's row? Only the last panel's may not be there."""
    return row_of_unit(index, panel, units) < rows
