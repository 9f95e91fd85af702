"""Which thread touches which element: the functions that the kernel for few rows computes with, for all threads."""

import itertools

import numpy as np
import pytest

from ggpass.kernels.cuda import geometry
from ggpass.kernels.cuda.geometry import CHUNK, ROWS_B, STEP, WARP, ceil_div
from ggpass.kernels.cuda.variants import Small, every_linear

#: m, n, k: no multiple of any tile, a single element, and exactly one tile or step.
SHAPES = ((1, 1, 1), (1, 7, 15), (3, 33, 100), (8, 8, 64), (9, 16, 128), (17, 35, 272), (33, 100, 1041), (65, 32, 2064))
VARIANTS = [v for k in (16, 15) for v in every_linear("rf8", "bfloat16", k) if isinstance(v, Small)]
CASES = [(v, s) for v, s in itertools.product(VARIANTS, SHAPES) if v.aligned == (s[2] % CHUNK == 0)]

pytestmark = pytest.mark.parametrize(
    ("variant", "shape"), CASES, ids=lambda value: value.name if isinstance(value, Small) else "x".join(map(str, value))
)


def grid(*sizes: int) -> list[np.ndarray]:
    """Every combination of the indices, as arrays that broadcast."""
    return list(np.ogrid[tuple(slice(size) for size in sizes)])


def iterations(variant: Small, k: int) -> int:
    """Steps that a warp copies: those it multiplies, and those it copies ahead at the end."""
    return ceil_div(k, STEP * variant.warps) + variant.stages - 1


def count_units(rows: int, k: int, size: int, row, start, exist) -> np.ndarray:
    """(rows, ⌈k / size⌉): how often each unit of `size` elements of a row is copied; nothing else is touched."""
    row, start, exist = np.broadcast_arrays(row, start, exist)
    copied = exist > 0
    row, start, exist = row[copied], start[copied], exist[copied]
    assert ((row >= 0) & (row < rows)).all()
    assert ((start >= 0) & (start < k)).all()
    assert (start % size == 0).all()
    np.testing.assert_array_equal(np.minimum(exist, size), np.minimum(k - start, size))
    counts = np.zeros((rows, ceil_div(k, size)), int)
    np.add.at(counts, (row, start // size), 1)
    return counts


def test_each_chunk_of_codes_is_copied_once_for_each_block_of_rows(variant: Small, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    blocks, row_blocks, _ = variant.launch(m, n, k).grid
    block, tile, warp, lane, i = grid(blocks, variant.tiles, variant.warps, WARP, iterations(variant, k))
    start = geometry.chunk_start(geometry.step_of(i, warp, variant.warps), lane)
    row = geometry.row_of_codes(block * variant.tiles + tile, lane)
    exist = geometry.inside(row, n, start, k)
    counts = count_units(n, k, CHUNK, row, start, exist) * row_blocks
    assert (counts == row_blocks).all()


def test_each_half_chunk_of_x_is_copied_once_for_each_block_of_columns(
    variant: Small, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    _, row_blocks, _ = variant.launch(m, n, k).grid
    sizes = (row_blocks, variant.row_parts, 2, variant.warps, WARP, iterations(variant, k))
    block, part, half, warp, lane, i = grid(*sizes)
    start = geometry.chunk_start(geometry.step_of(i, warp, variant.warps), lane)
    row = block * variant.rows + geometry.row_of_x(part // 2, lane, part % 2)
    first, size = geometry.half_of_x(start, geometry.inside(row, m, start, k), half)
    counts = count_units(m, k, CHUNK // 2, row, first, np.asarray(size) // 2)
    assert (np.asarray(size) % 2 == 0).all()
    assert (counts == 1).all()


def test_what_is_copied_ahead_at_the_end_does_not_exist(variant: Small, shape: tuple[int, int, int]) -> None:
    """The last `stages` - 1 steps of a warp are never multiplied, so nothing of them may be wanted."""
    _, n, k = shape
    warp, lane, i = grid(variant.warps, WARP, variant.stages - 1)
    last = ceil_div(k, STEP * variant.warps)
    start = geometry.chunk_start(geometry.step_of(last + i, warp, variant.warps), lane)
    assert (geometry.inside(0, n, start, k) <= 0).all()


def test_copies_of_a_ring_lie_apart_and_aligned(variant: Small, shape: tuple[int, int, int]) -> None:
    warp, stage, part, lane = grid(variant.warps, variant.stages, variant.parts, WARP)
    places = geometry.ring_place(warp, stage, part, lane, variant.stages, variant.parts).ravel()
    assert (places % 4 == 0).all()
    assert len(np.unique(places)) == places.size
    assert places.min() == 0
    assert places.max() + 4 <= variant.ring_words


def test_sums_lie_apart_and_are_found_again(variant: Small, shape: tuple[int, int, int]) -> None:
    """A lane's sum of row g and column 2t + i, of each part and tile, against where its output looks for it."""
    warp, part, tile, i, lane = grid(variant.warps, variant.row_parts, variant.tiles, 2, WARP)
    places = geometry.warp_sums(warp, variant.sums) + geometry.sum_place(part, tile, variant.tiles, i, lane)
    assert len(np.unique(places)) == places.size == variant.warps * variant.sums * WARP
    assert places.max() < variant.ring_words
    row = part * ROWS_B + lane // 4
    column = tile * ROWS_B + lane % 4 * 2 + i
    found = geometry.warp_sums(warp, variant.sums) + geometry.output_place(row, column, variant.tiles)
    np.testing.assert_array_equal(places, np.broadcast_to(found, places.shape))


def test_each_output_is_written_once(variant: Small, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    blocks, row_blocks, _ = variant.launch(m, n, k).grid
    columns = variant.tiles * ROWS_B
    each = ceil_div(variant.rows * columns, variant.threads)
    block, row_block, i, thread = grid(blocks, row_blocks, each, variant.threads)
    row, column = geometry.output_of(i, thread, variant.threads, columns)
    to_row, to_column = row_block * variant.rows + row, block * columns + column
    written = (row < variant.rows) & (to_row < m) & (to_column < n)
    at = (np.broadcast_to(a, written.shape)[written] for a in (to_row, to_column))
    counts = np.zeros((m, n), int)
    np.add.at(counts, tuple(at), 1)
    assert (counts == 1).all()
