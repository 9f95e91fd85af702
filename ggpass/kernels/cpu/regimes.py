"""Which kernel computes how many rows of x: the switch points, as measured by `benchmarks/regimes.py`.

4096 x 4096 RF8 on Zen 3, one thread, ms (torch's fp32 linear above it); each column's least is what is chosen:

    M                      1     2     4     8     9    16    24    32    64   128   256   512
    torch fp32          2.97  6.27  9.13 10.12 11.48 12.98 16.18 19.43 31.07 54.61 101.4 195.7
    rows1               1.16  2.09  6.45 10.20
    rows2               1.73  1.69  2.99  5.82  7.08 11.15
    rows4               2.51  2.41  2.48  4.67  6.77  8.82 13.07 17.24 34.20
    rows8               3.94  3.94  3.92  3.89  7.59  7.59 11.32 15.08 29.77 59.41 120.3 250.8
    tile                7.02  6.98  6.97  6.95  6.97  7.22 13.07 13.18 24.78 47.82 93.90 201.7
    dequantize + BLAS   3.71  4.53  8.05  9.53 10.84 12.78 15.89 19.97 32.06 56.93 104.7 200.7
"""

from __future__ import annotations

from dataclasses import dataclass

#: Codes of one cache line: every loop over k goes line by line, and shorter rows are padded with code 0 and x = 0.
LINE = 64
#: Vectors of rows of x side by side in a panel of the tile kernel.
PANEL_VECTORS = 2


@dataclass(frozen=True)
class Regimes:
    """Ranges of M, each `(last M, kernel)`; beyond the last, weights are dequantized in blocks for torch's BLAS.

    `rows<b>` takes b rows of x at a time, `tile` two vectors of rows.
    """

    ranges: tuple[tuple[int, str], ...]

    def kernel(self, m: int) -> str | None:
        """The kernel for M = m; None means dequantize and multiply."""
        return next((kernel for last, kernel in self.ranges if m <= last), None)

    def kernels(self) -> tuple[str, ...]:
        """Return every kernel that this format needs."""
        return (*dict.fromkeys(kernel for _, kernel in self.ranges), "dequantize", "embedding")


_DECODED_IN_REGISTERS = ((1, "rows1"), (2, "rows2"), (4, "rows4"), (8, "rows8"), (16, "tile"), (24, "rows8"))

RF8 = Regimes((*_DECODED_IN_REGISTERS, (384, "tile")))
LINEAR = Regimes((*_DECODED_IN_REGISTERS, (384, "tile")))
#: A gather is slow enough that few rows already pay for decoding into memory.
TABLE = Regimes(((1, "rows1"), (4, "rows4")))

#: By the kind of a `formats.base.Decoder`, in the order of Kind in native/onnxruntime/kernels.h.
BY_KIND = {"rf8": RF8, "linear": LINEAR, "table": TABLE}
