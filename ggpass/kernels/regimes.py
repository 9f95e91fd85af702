"""Which kernel computes how many rows of x: the switch points, as measured by `benchmarks/linear.py --sweep`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Regimes:
    """Upper ends (inclusive) of the ranges of M.

    `rows` lists the batches of the rows kernels: the smallest that holds all M rows computes them in one go.
    Up to `tile` the tile kernel computes (nowhere where that is 0); beyond, the weights are dequantized block by
    block and multiplied by torch's BLAS.
    """

    rows: tuple[int, ...]
    tile: int

    def kernel(self, m: int) -> str | None:
        """The kind of kernel for M = m; None means dequantize and multiply."""
        for batch in self.rows:
            if m <= batch:
                return f"rows{batch}"
        return "tile" if m <= self.tile else None

    def kernels(self) -> tuple[str, ...]:
        """Every kind of kernel that this format needs."""
        products = (*(f"rows{batch}" for batch in self.rows), *(("tile",) if self.tile else ()))
        return (*products, "dequantize", "embedding")


#: Vectors of rows of x side by side in a panel of the tile kernel.
PANEL_VECTORS = 2

RF8 = Regimes(rows=(1, 2, 4, 8), tile=256)
LINEAR = Regimes(rows=(1, 2, 4, 8), tile=256)
#: A gather is slow enough that few rows already pay for decoding into memory.
TABLE = Regimes(rows=(1, 4), tile=0)

BY_KIND = {"rf8": RF8, "linear": LINEAR, "table": TABLE}
