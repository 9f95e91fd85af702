"""Which kernel computes how many rows of x: the switch points, as measured by `benchmarks/linear.py --sweep`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Regimes:
    """Upper ends (inclusive) of the ranges of M.

    `rows` lists the batches of the rows kernels: the smallest that holds all M rows computes them in one go.
    Up to `narrow` the tile kernel with one vector of rows in a panel, up to `wide` the one with two; beyond,
    the weights are dequantized block by block and multiplied by torch's BLAS.
    """

    rows: tuple[int, ...]
    narrow: int
    wide: int

    def kernel(self, m: int) -> str | None:
        """The kind of kernel for M = m; None means dequantize and multiply."""
        for batch in self.rows:
            if m <= batch:
                return f"rows{batch}"
        if m <= self.narrow:
            return "tile1"
        return "tile2" if m <= self.wide else None


RF8 = Regimes(rows=(1, 2, 4), narrow=8, wide=256)
LINEAR = Regimes(rows=(1, 2, 4), narrow=8, wide=256)
#: A gather is slow enough that four rows already pay for decoding into memory.
TABLE = Regimes(rows=(1, 2, 4), narrow=8, wide=64)

BY_KIND = {"rf8": RF8, "linear": LINEAR, "table": TABLE}
