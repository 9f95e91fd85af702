"""Variant: one CUDA kernel to build, as numbers; and which variants serve which shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ggpass.kernels.cuda.geometry import CHUNK, ROWS_A, ROWS_B, WARP, ceil_div

DTYPES = ("bfloat16", "float16")
DECODERS = ("rf8", "table")
#: Copies of the codebook in shared memory, so that lanes seldom meet in a bank.
COPIES = 8


@dataclass(frozen=True)
class Launch:
    """Blocks in the grid, threads in a block, bytes of dynamic shared memory."""

    grid: tuple[int, int, int]
    block: int
    shared: int


class Variant(Protocol):
    """One kernel: its name is its entry point and, with an architecture, its key in the cache."""

    @property
    def family(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def decoder(self) -> str: ...
    @property
    def dtype(self) -> str: ...

    def launch(self, m: int, n: int, k: int) -> Launch:
        """The launch for m rows of x, or ids, and (n, k) codes."""
        ...


def table_bytes(decoder: str) -> int:
    """Shared memory of the copies of the codebook, a float32 word a value."""
    return 256 * COPIES * 4 if decoder == "table" else 0


@dataclass(frozen=True)
class Small:
    """y = x · wᵀ for few rows of x, each code decoded once, in registers.

    A block takes `tiles` tiles of 8 rows of codes; its `warps` warps share K out among them, step by step, and add
    their sums in shared memory. Copies to shared memory run `stages` - 1 steps ahead of the products.

    Attributes:
        rows: of x in one pass: 8, 16, 32 or 64; more rows of x take more blocks.
        aligned: made for K % 16 = 0; the others load byte by byte.
    """

    decoder: str
    dtype: str
    aligned: bool
    rows: int
    tiles: int
    warps: int
    stages: int

    family = "small"

    @property
    def name(self) -> str:
        shape = f"m{self.rows}_n{self.tiles * ROWS_B}_w{self.warps}_s{self.stages}"
        return f"small_{shape}_{self.decoder}_{self.dtype}{'' if self.aligned else '_bytes'}"

    @property
    def row_tiles(self) -> int:
        """Tensor-core tiles of 16 rows of x."""
        return ceil_div(self.rows, ROWS_A)

    @property
    def sums(self) -> int:
        """Accumulator registers of a lane."""
        return self.row_tiles * self.tiles * 4

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.warps * WARP

    @property
    def parts(self) -> int:
        """Copies of 16 bytes that a lane makes a step: its chunk of each tile, two for each of its rows of x."""
        return self.tiles + self.row_parts * 2

    @property
    def row_parts(self) -> int:
        """Rows of x of a lane: one of every 8."""
        return ceil_div(self.rows, ROWS_B)

    @property
    def ring_words(self) -> int:
        """32-bit words of the ring of steps, which the warps' sums reuse at the end."""
        return self.warps * WARP * max(self.stages * self.parts * 4, self.sums)

    def launch(self, m: int, n: int, k: int) -> Launch:
        grid = (ceil_div(n, self.tiles * ROWS_B), ceil_div(m, self.rows), 1)
        return Launch(grid, self.threads, self.ring_words * 4 + table_bytes(self.decoder))


#: Blocking of `Small` by the rows of x in a pass: tiles of 8 rows of codes, warps, stages.
_SMALL = {8: (1, 8, 4), 16: (2, 8, 3), 32: (4, 4, 3), 64: (4, 4, 2)}


def _kind(decoder: str, dtype: str, k: int) -> tuple[str, str, bool]:
    if decoder not in DECODERS:
        raise ValueError(f"no CUDA kernel decodes by {decoder!r}; there are {', '.join(DECODERS)}")
    if dtype not in DTYPES:
        raise ValueError(f"no CUDA kernel takes {dtype} activations; there are {', '.join(DTYPES)}")
    return decoder, dtype, k % CHUNK == 0


def linear_variants(decoder: str, dtype: str, m: int, n: int, k: int) -> tuple[Variant, ...]:
    """The variants that can compute m rows of x with (n, k) codes, the best guess first.

    Raises:
        ValueError: a decoder or a dtype that there is no kernel for.
    """
    kind = _kind(decoder, dtype, k)
    rows = next((rows for rows in _SMALL if m <= rows), max(_SMALL))
    return (Small(*kind, rows, *_SMALL[rows]),)


def every_linear(decoder: str, dtype: str, k: int) -> tuple[Variant, ...]:
    """All that `linear_variants` may ever answer for one width, whatever m and n: what an artifact carries."""
    kind = _kind(decoder, dtype, k)
    return tuple(Small(*kind, rows, *blocking) for rows, blocking in _SMALL.items())
