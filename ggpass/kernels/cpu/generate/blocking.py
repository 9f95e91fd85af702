"""How each kernel is blocked, as measured on Zen 3 (4096 x 4096, one thread): rows of x, then GB/s of codes.

rows1: two rows of codes at a time, N / 2 apart, read 5 to 15 % faster from memory than one (768 x 768 15.9 against
13.8, 1024 x 4096 15.3 against 14.7), the same from caches (16.9; without any decoding 20); rows close by, 10 to 11.
Four sums in all: eight spill registers, 12.3. Prefetch 1 KiB ahead; 2 and 4 KiB lose some percent. Eight rows of x:
rows8 takes 3.9 ms, a tile of one vector by twelve columns 4.5 ms (more loads than products), of two vectors by six
7.0 ms (half of it padding). A tile of four times six rows, 128 codes deep, takes 1 % less than one of two times six,
256 deep, and 2 % less than one of four times six, 256 deep.
"""

from __future__ import annotations

from ggpass.kernels.cpu.generate.rows import RowsShape
from ggpass.kernels.cpu.generate.tile import TileShape
from ggpass.kernels.cpu.regimes import PANEL_VECTORS

ROWS = {
    shape.batch: shape
    for shape in (
        RowsShape(batch=1, chains=2, ahead=1024, streams=2),
        RowsShape(batch=2, chains=4, ahead=2, rows=64, depth=1024),
        RowsShape(batch=4, chains=2, ahead=2, rows=64, depth=512),
        RowsShape(batch=8, chains=1, ahead=2, rows=64, depth=512),
    )
}
TILE = TileShape(vectors=PANEL_VECTORS, columns=6, tiles=4, depth=128)
