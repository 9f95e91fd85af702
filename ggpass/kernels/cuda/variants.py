"""Variant: one CUDA kernel to build, as numbers; and which variants serve which shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ggpass.kernels.cuda import geometry
from ggpass.kernels.cuda.geometry import (
    CHUNK,
    COPIES,
    ROWS_A,
    ROWS_B,
    TOGETHER,
    UNIT_WORDS,
    WARP,
    WARP_COLUMNS,
    ceil_div,
)

DTYPES = ("bfloat16", "float16")
DECODERS = ("rf8", "table")


@dataclass(frozen=True)
class Launch:
    """Blocks in the grid, threads in a block, bytes of dynamic shared memory."""

    grid: tuple[int, int, int]
    block: int
    shared: int


def table_bytes(decoder: str) -> int:
    """Shared memory of the copies of the codebook, a float32 word a value."""
    return 256 * COPIES * 4 if decoder == "table" else 0


@dataclass(frozen=True)
class _Product:
    """What the variants of y = x · wᵀ share.

    Attributes:
        aligned: made for K % 16 = 0; the others load byte by byte.
    """

    decoder: str
    dtype: str
    aligned: bool

    family: ClassVar[str]

    @property
    def kind(self) -> str:
        """Return the end of its name."""
        return f"{self.decoder}_{self.dtype}{'' if self.aligned else '_bytes'}"


@dataclass(frozen=True)
class Small(_Product):
    """y = x · wᵀ for few rows of x, each code decoded once, in registers.

    A block takes `tiles` tiles of 8 rows of codes; its `warps` warps share K out among them, step by step, and add
    their sums in shared memory. Copies to shared memory run `stages` - 1 steps ahead of the products.

    Attributes:
        rows: of x in one pass: 8, 16, 32 or 64; more rows of x take more blocks.
    """

    rows: int
    tiles: int
    warps: int
    stages: int

    family = "small"

    @property
    def name(self) -> str:
        return f"small_m{self.rows}_n{self.tiles * ROWS_B}_w{self.warps}_s{self.stages}_{self.kind}"

    @property
    def row_tiles(self) -> int:
        """Tensor-core tiles of 16 rows of x."""
        return ceil_div(self.rows, ROWS_A)

    @property
    def paired(self) -> bool:
        """Do rows 8 to 15 of a product hold more of k for the same rows of x, instead of more rows?"""
        return self.rows <= ROWS_A

    @property
    def sums(self) -> int:
        """Sums of a lane that become outputs: one of every 8 rows of x and 4 rows of codes."""
        return self.row_parts * self.tiles * 2

    @property
    def accumulators(self) -> int:
        """Registers that the products add to; half of them are of no use if they are `paired`."""
        return self.sums * (4 if self.paired else 1)

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


@dataclass(frozen=True)
class Gemm(_Product):
    """y = x · wᵀ for many rows of x, codes decoded between shared memory and the tensor cores; see `gemm_geometry`.

    Attributes:
        rows: of x in a block: 64 or 128, all of them each warp's.
        column_warps: warps side by side, each with 32 rows of codes.
        groups: of such warps, which share K out by steps of 64: more warps a block where blocks are few.
    """

    rows: int
    column_warps: int
    groups: int
    stages: int

    family = "gemm"

    @property
    def name(self) -> str:
        return f"gemm_m{self.rows}_n{self.columns}_g{self.groups}_s{self.stages}_{self.kind}"

    @property
    def columns(self) -> int:
        """Rows of codes in a block."""
        return self.column_warps * WARP_COLUMNS

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.column_warps * self.groups * WARP

    @property
    def sums(self) -> int:
        """Accumulator registers of a lane."""
        return self.rows * WARP_COLUMNS // WARP

    @property
    def group_words(self) -> int:
        """32-bit words of a group's step: its x and its codes."""
        return (self.rows * geometry.X_UNITS + self.columns * geometry.CODE_UNITS) * UNIT_WORDS

    @property
    def exchange_words(self) -> int:
        """Words of the sums that groups hand to the first; the rounded tile of y comes behind them."""
        return (self.groups - 1) * self.column_warps * WARP * self.sums

    @property
    def ring_words(self) -> int:
        """Words of the ring of steps, which sums and outputs reuse at the end."""
        return max(self.stages * self.groups * self.group_words, self.exchange_words + self.rows * self.columns // 2)

    def launch(self, m: int, n: int, k: int) -> Launch:
        blocks = ceil_div(m, self.rows)
        grid = (min(blocks, TOGETHER), ceil_div(n, self.columns), ceil_div(blocks, TOGETHER))
        return Launch(grid, self.threads, self.ring_words * 4 + table_bytes(self.decoder))


@dataclass(frozen=True)
class Triton:
    """y = x · wᵀ by Triton, for N and K that 16 divides; only if it is measured to be faster, see `tune`.

    Attributes:
        rows: of x in a block.
        columns: rows of codes in a block.
    """

    dtype: str
    rows: int
    columns: int
    warps: int
    stages: int

    family = "triton"
    decoder = "rf8"
    depth = 64
    together = TOGETHER
    #: Where it reaches instructions that TVM's kernels do not.
    ARCHS = ("sm_90", "sm_100")

    @property
    def name(self) -> str:
        return f"triton_m{self.rows}_n{self.columns}_w{self.warps}_s{self.stages}_rf8_{self.dtype}"

    def launch(self, m: int, n: int, k: int) -> Launch:
        """The launch; Triton keeps `stages` steps of x, one less of codes, and barriers, in shared memory."""
        shared = self.depth * (self.stages * self.rows * 2 + (self.stages - 1) * self.columns) + 1024
        return Launch((ceil_div(m, self.rows) * ceil_div(n, self.columns), 1, 1), self.warps * WARP, shared)


@dataclass(frozen=True)
class Rows:
    """Rows of codes decoded, scaled and rounded: "embedding", those that ids name, or "dequantize", all; see
    `geometry`.

    Attributes:
        dtype: of the output: one of `DTYPES`, or "float32".
        aligned: made for rows of outputs that begin at multiples of 16 bytes.
    """

    family: str
    decoder: str
    dtype: str
    aligned: bool

    @property
    def name(self) -> str:
        return f"{self.family}_{self.decoder}_{self.dtype}{'' if self.aligned else '_bytes'}"

    @property
    def unit(self) -> int:
        """Codes that a thread decodes for one write."""
        return 1 if not self.aligned else 4 if self.dtype == "float32" else 8

    def launch(self, m: int, n: int, k: int) -> Launch:
        """Return the launch for m rows of outputs; those of "dequantize" are the n of the codes."""
        panels = ceil_div(m, geometry.PANEL)
        if panels > geometry.MOST_PANELS:
            most = geometry.MOST_PANELS * geometry.PANEL
            raise ValueError(f"{m} rows are more than one launch takes, {most}; split them")
        units = min(m, geometry.PANEL) * (k // self.unit)
        blocks = ceil_div(units, geometry.ROW_PARTS * geometry.ROW_THREADS)
        return Launch((blocks, panels, 1), geometry.ROW_THREADS, max(4, table_bytes(self.decoder)))


#: One kernel: its name is its entry point and, with an architecture, its key in the cache; `launch(m, n, k)` is for m
#: rows of x, or ids, and (n, k) codes.
Variant = Small | Gemm | Triton | Rows

#: Blocking of `Small` by the rows of x in a pass: tiles of 8 rows of codes, warps, stages.
_SMALL = {8: (2, 8, 4), 16: (4, 8, 3), 32: (4, 4, 3), 64: (4, 4, 2)}
#: Blockings of `Gemm`: rows of x, warps side by side, groups, stages. The first leaves room for a second block beside
#: it; the second has as many warps in one block, for outputs that give each multiprocessor one; the third is for less.
_WIDE, _DEEP, _NARROW = (128, 4, 1, 3), (128, 4, 2, 3), (64, 2, 2, 3)
#: Blockings of `Triton`: rows of x, rows of codes, warps, stages. The second is for fewer rows of x, and two of its
#: blocks run side by side.
_TRITON = ((256, 128, 8, 4), (128, 128, 8, 4))
#: Shared memory that a block may have on every architecture: sm_86 and sm_89 have the least.
LEAST_SHARED = 99 << 10
#: Multiprocessors of a large GPU, for guesses.
_MULTIPROCESSORS = 108


def _known(decoder: str) -> str:
    if decoder not in DECODERS:
        raise ValueError(f"no CUDA kernel decodes by {decoder!r}; there are {', '.join(DECODERS)}")
    return decoder


def _kind(decoder: str, dtype: str, k: int) -> tuple[str, str, bool]:
    if dtype not in DTYPES:
        raise ValueError(f"no CUDA kernel takes {dtype} activations; there are {', '.join(DTYPES)}")
    return _known(decoder), dtype, k % CHUNK == 0


def row_variant(family: str, decoder: str, dtype: str, k: int) -> Rows:
    """Return the variant for "embedding" or "dequantize" of rows of k codes.

    Args:
        dtype: of what comes out; float32 too.

    Raises:
        ValueError: a decoder, a dtype or a family that there is no kernel for.
    """
    if family not in ("embedding", "dequantize"):
        raise ValueError(f"no CUDA kernel is called {family!r}; there are embedding and dequantize")
    if dtype not in (*DTYPES, "float32"):
        raise ValueError(f"no CUDA kernel writes {dtype}; there are {', '.join(DTYPES)} and float32")
    variant = Rows(family, _known(decoder), dtype, True)
    return variant if k % variant.unit == 0 else Rows(family, decoder, dtype, False)


def linear_variants(
    decoder: str, dtype: str, m: int, n: int, k: int, shared: int = LEAST_SHARED
) -> tuple[Variant, ...]:
    """Return the variants that can compute m rows of x with (n, k) codes, the best guess first.

    Args:
        shared: bytes of shared memory that a block may have on the device; what takes more is left out.

    Raises:
        ValueError: a decoder or a dtype that there is no kernel for.
    """
    kind = _kind(decoder, dtype, k)
    small = [Small(*kind, rows, *blocking) for rows, blocking in _SMALL.items() if m <= rows]
    gemms = [Gemm(*kind, *blocking) for blocking in _by_guess(m, n) if m > ROWS_A]
    fitting = [variant for variant in small if variant.launch(m, n, k).shared <= shared]
    # Of the small ones the least: it wastes the fewest rows, and if it does not fit the next one may.
    return (*fitting[:1], *(variant for variant in gemms if variant.launch(m, n, k).shared <= shared))


def _by_guess(m: int, n: int) -> tuple[tuple[int, int, int, int], ...]:
    blocks = ceil_div(m, _WIDE[0]) * ceil_div(n, _WIDE[1] * WARP_COLUMNS)
    if blocks >= 2 * _MULTIPROCESSORS:
        return _WIDE, _DEEP, _NARROW
    return (_DEEP, _WIDE, _NARROW) if 2 * blocks >= _MULTIPROCESSORS else (_NARROW, _DEEP, _WIDE)


def measured_variants(decoder: str, dtype: str, m: int, n: int, k: int, arch: str) -> tuple[Variant, ...]:
    """More variants for a shape on one architecture: they need Triton, and are taken only where `tune` says so."""
    if arch not in Triton.ARCHS or decoder != "rf8" or n % CHUNK or k % CHUNK or m <= max(_SMALL):
        return ()
    return tuple(Triton(dtype, *blocking) for blocking in _TRITON)


def every_linear(decoder: str, dtype: str, k: int) -> tuple[Variant, ...]:
    """Return all that `linear_variants` may ever answer for one width, whatever m and n: what an artifact carries."""
    kind = _kind(decoder, dtype, k)
    small = (Small(*kind, rows, *blocking) for rows, blocking in _SMALL.items())
    return (*small, *(Gemm(*kind, *blocking) for blocking in (_WIDE, _DEEP, _NARROW)))
