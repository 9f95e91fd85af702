"""Which thread touches which element in the GEMM: plain arithmetic, as in `geometry`, for TensorIR and NumPy alike.

A block computes `rows` rows of x times `columns` rows of codes. Each of its warps computes all rows of 32 columns, so
that a decoded weight serves `rows` / 16 products; where a block has several warps for the same columns, they share out
K by steps of 64. Units of 16 bytes go to shared memory: 8 activations, or a chunk of 16 codes.

The weights are the A operand of the products and x is B. Which row of codes is which row of A is free too: rows g and
g + 8 are neighbouring rows of codes, so that a lane's sums are pairs of neighbours in y.

Shared memory holds, for each of the steps, the block's rows of x, 8 units each, then its rows of codes, 4 units each.
A quarter of a warp, the unit of a 16-byte access, reads two rows g: of x every second unit of neighbouring rows, which
would meet in the banks, so odd rows swap neighbouring units; of the codes all units of two rows of the same parity,
which therefore lie side by side.
"""

from __future__ import annotations

from ggpass.kernels.cuda.geometry import (
    CODE_UNITS,
    ROWS_A,
    ROWS_B,
    STEP,
    TOGETHER,
    UNIT_WORDS,
    X_UNITS,
    Number,
    ceil_div,
    group,
    quad,
)  # fmt: skip


def row_block(bundle: Number, in_bundle: Number) -> Number:
    """The block of rows of blocks (x, y, z) = (in_bundle, block of columns, bundle), which start in that order.

    `TOGETHER` blocks of rows take one block of columns, then the next: those that run at the same time read few rows of
    x and few rows of codes, out of the L2 cache.
    """
    return bundle * TOGETHER + in_bundle


def steps(k: Number, groups: int, first_row: Number, m: Number) -> Number:
    """Steps of a block: ⌈k / (64 · groups)⌉, and none for a bundle's blocks beyond the rows of x."""
    return ceil_div(k, STEP * groups) * (first_row < m)


def copied_unit(index: Number, units: int, rows: int) -> tuple[Number, Number, Number]:
    """(place of a row, group, unit) of a block's `index`-th copy of a step: 8 threads fill 128 bytes side by side."""
    return index // units % rows, index // (units * rows), index % units


def k_of_unit(step: Number, group: Number, unit: Number, groups: int, size: int) -> Number:
    """k of a unit's first element; a step of the block is `groups` steps of 64, `size` elements make a unit."""
    return (step * groups + group) * STEP + unit * size


def x_word(row: Number, unit: Number) -> Number:
    """First word of a unit of x within a group's rows of x; odd rows swap neighbouring units."""
    return (row * X_UNITS + (unit ^ (row % 2))) * UNIT_WORDS


def neighbours(row: Number) -> Number:
    """Place of a row of codes among a group's: of four rows the even ones first. It is its own inverse."""
    return row // 4 * 4 + row % 2 * 2 + row // 2 % 2


def code_word(row: Number, unit: Number) -> Number:
    """First word of a unit of codes within a group's rows of codes."""
    return (neighbours(row) * CODE_UNITS + unit) * UNIT_WORDS


def row_of_values(tile: Number, lane: Number) -> Number:
    """Row of x, in the block, whose values a lane gives to the product of an x tile: 8 · tile + g."""
    return tile * ROWS_B + group(lane)


def row_of_sum(tile: Number, lane: Number, i: Number) -> Number:
    """Row of y, in the block, of a lane's sums i and i + 2: 8 · tile + 2t + i."""
    return tile * ROWS_B + quad(lane) * 2 + i


def column_of_sum(tile: Number, lane: Number, part: Number) -> Number:
    """Column of y, in the block, of a lane's sums 2 · part + i, and its row of codes: 16 · tile + 2g + part."""
    return tile * ROWS_A + group(lane) * 2 + part


def y_word(row: Number, pair: Number, columns: int) -> Number:
    """Word of a pair of neighbouring columns in the block's rounded tile of y, on its way to 16-byte stores.

    A warp writes two units of every second row at a time: places are turned by the row, so that they meet in no bank.
    """
    unit = (pair // UNIT_WORDS) ^ (row % 8)
    return row * (columns // 2) + unit * UNIT_WORDS + pair % UNIT_WORDS
