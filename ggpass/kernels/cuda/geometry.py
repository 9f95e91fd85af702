"""Which thread touches which element: index and predicate functions of the CUDA kernels.

Every function here is plain arithmetic on its arguments, so that the kernels call it with TensorIR expressions and the
tests with NumPy arrays over all blocks and threads: what is shown of the one holds for the other.

The unit of work is a *chunk*: 16 consecutive codes of a row, one 16-byte load. The four lanes `t` of a group hold the
chunks of 64 consecutive codes, the eight groups `g` eight rows. For the tensor cores, which position of their k
dimension a code takes does not matter as long as the activations take the same one, so that word j of a chunk simply is
the B fragment of the j-th product of shape (16, 8, 16), and no code has to be moved between lanes.
"""

from __future__ import annotations

from typing import Any

#: Codes of one 16-byte load.
CHUNK = 16
#: Codes of a row that the four lanes of a group take together.
STEP = 64
#: Rows of codes in the B operand of one tensor-core product, and rows of activations in its A operand.
ROWS_B = 8
ROWS_A = 16
WARP = 32
#: Copies of the codebook in shared memory, so that lanes seldom meet in a bank.
COPIES = 8

#: The GEMM's units of 16 bytes: 32-bit words of one, activations in it, and units of a step in a row of x and of codes.
UNIT_WORDS = 4
UNIT_X = 8
X_UNITS = STEP // UNIT_X
CODE_UNITS = STEP // CHUNK
#: Columns of y of one warp of the GEMM, and tiles of 16 of them, the A operand's rows.
WARP_COLUMNS = 32
WARP_TILES = WARP_COLUMNS // ROWS_A
#: Blocks of rows that share a block of codes in the cache before the next is read.
TOGETHER = 8

#: For rows that are only decoded: threads of a block, and units of each that are under way at a time.
ROW_THREADS = 128
ROW_PARTS = 4
#: Rows of one value of blockIdx.y, so that an index of a unit among them has 32 bits. Their units fill whole blocks.
PANEL = 2 * ROW_PARTS * ROW_THREADS
#: Values of blockIdx.y that a grid can have.
MOST_PANELS = 65535

#: A number: int, NumPy integer array, or TensorIR expression.
Number = Any


def ceil_div(a: Number, b: Number) -> Number:
    """⌈a / b⌉ for a ≥ 0, b > 0."""
    return (a + (b - 1)) // b


def group(lane: Number) -> Number:
    """g = lane / 4: the row of codes, or of activations, that a lane works on."""
    return lane // 4


def quad(lane: Number) -> Number:
    """t = lane mod 4: the chunk of a step that a lane loads."""
    return lane % 4


def chunk_start(step: Number, lane: Number) -> Number:
    """k of the first code of a lane's chunk: 64 · step + 16 · t."""
    return step * STEP + quad(lane) * CHUNK


def row_of_codes(tile: Number, lane: Number) -> Number:
    """n = 8 · tile + g."""
    return tile * ROWS_B + group(lane)


def row_of_x(tile: Number, lane: Number, half: Number) -> Number:
    """m = 16 · tile + 8 · half + g."""
    return tile * ROWS_A + half * 8 + group(lane)


def inside(row: Number, rows: Number, start: Number, k: Number) -> Number:
    """Return how many elements of a chunk exist, unclamped: k - start in a row that exists, else at most 0.

    16 or more means the whole chunk, 0 or less nothing of it.
    """
    return (k - start) * (row < rows)


def half_of_x(start: Number, count: Number, half: Number) -> tuple[Number, Number]:
    """(k of the first activation, bytes that exist) of half a chunk's activations, one 16-byte load.

    Args:
        count: activations that exist of the chunk, as `inside` gives them.
    """
    return start + half * (CHUNK // 2), (count - half * (CHUNK // 2)) * 2


def step_of(i: Number, warp: Number, warps: int) -> Number:
    """Return the i-th step of a warp, where the warps of a block share K out: warps · i + warp."""
    return i * warps + warp


def ring_place(warp: Number, stage: Number, part: Number, lane: Number, stages: int, parts: int) -> Number:
    """First of the four shared words of a lane's copy: lanes lie side by side, so that none meet in a bank."""
    return (((warp * stages + stage) * parts + part) * WARP + lane) * 4


def sum_place(part: Number, tile: Number, tiles: int, i: Number, lane: Number) -> Number:
    """Shared word, among a warp's, of its sum of row g of a part of x and of column 2t + i of a tile of codes."""
    return ((part * tiles + tile) * 2 + i) * WARP + lane


def output_place(row: Number, column: Number, tiles: int) -> Number:
    """Return the same from a block's row of x and row of codes: g = row mod 8, t = (column mod 8) / 2."""
    lane = (row % ROWS_B) * 4 + column % ROWS_B // 2
    return sum_place(row // ROWS_B, column // ROWS_B, tiles, column % 2, lane)


def output_of(i: Number, thread: Number, threads: int, columns: int) -> tuple[Number, Number]:
    """(row of x, row of codes), in the block, of a thread's i-th output: neighbouring threads write side by side."""
    output = i * threads + thread
    return output // columns, output % columns


def warp_sums(warp: Number, sums: int) -> Number:
    """First shared word of a warp's sums, `sums` of them a lane."""
    return warp * (sums * WARP)


# Rows that are only decoded. The unit is 16 bytes written: 8 codes for 16-bit outputs, 4 for float32, and one code if
# rows of outputs begin anywhere. Neighbouring threads take neighbouring units, so that a warp reads and writes whole
# cache lines; with 16 codes a thread each write would leave out every second 16 bytes. A thread's units lie far apart.


def unit_index(block: Number, part: Number, thread: Number) -> Number:
    """Return a thread's part-th unit, among those of a panel."""
    return (block * ROW_PARTS + part) * ROW_THREADS + thread


def row_of_unit(index: Number, panel: Number, units: Number) -> Number:
    """Return the row of outputs, of `units` units each, that a unit lies in."""
    return panel * PANEL + index // units


def start_of_unit(index: Number, units: Number, size: int) -> Number:
    """k of its first code."""
    return index % units * size


def exists(index: Number, panel: Number, units: Number, rows: Number) -> Number:
    """Does the output have the unit's row? Only the last panel's may not be there."""
    return row_of_unit(index, panel, units) < rows
