"""How each kernel is blocked, as measured on Zen 3 (4096 x 4096, one thread): rows of x, then GB/s of codes.

rows1: prefetch 1 KiB ahead 16.0, 2 KiB 16.7, 4 KiB 16.2; two or four rows of codes at a time, 4096 / 2 apart, read
faster (raw 22 instead of 20) but spill registers, and lose: 15.2. rows8 without blocks of depth reads x from L2: 2.9
instead of 4.3. tile: one vector of rows by twelve columns needs more loads than two by six: 3.7 instead of 4.3 at 8.
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
