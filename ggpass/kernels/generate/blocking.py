"""How each kernel is blocked, in one place."""

from __future__ import annotations

from ggpass.kernels.generate.rows import RowsShape
from ggpass.kernels.generate.tile import TileShape

ROWS = (RowsShape(1, 1, 4, 2048), RowsShape(2, 1, 4, 2048), RowsShape(4, 2, 1, 2048))
TILES = (TileShape(1, 12, 1, 256), TileShape(2, 6, 2, 256))
