"""How each kernel is blocked, as measured on Zen 3 (4096 x 4096, one thread): rows of x, then GB/s of codes.

rows1: prefetch 1 KiB ahead 16.0, 2 KiB 16.7, 4 KiB 16.2. Two or four rows of codes at a time, 4096 / 2 or / 4 apart,
would read faster (22 to 23 without any decoding, against 20 for one), but decoding two rows at once spills registers
and loses: 15.2. Eight sums a row spill as well: 12.3. Eight rows of x: rows8 takes 3.9 ms, a tile of one vector by
twelve columns 4.5 ms (more loads than products), of two vectors by six 7.0 ms (half of it padding).
"""

from __future__ import annotations

from ggpass.kernels.generate.rows import RowsShape
from ggpass.kernels.generate.tile import TileShape
from ggpass.kernels.regimes import PANEL_VECTORS

ROWS = {
    shape.batch: shape
    for shape in (
        RowsShape(batch=1, chains=4, ahead=2048),
        RowsShape(batch=2, chains=4, ahead=2, rows=64, depth=1024),
        RowsShape(batch=4, chains=2, ahead=2, rows=64, depth=512),
        RowsShape(batch=8, chains=1, ahead=2, rows=64, depth=512),
    )
}
TILE = TileShape(vectors=PANEL_VECTORS, columns=6, tiles=2, depth=256)
