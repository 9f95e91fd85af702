"""The index functions of the GEMM and of the row kernels in NumPy, over every block and thread."""

import numpy as np
import pytest

from ggpass.kernels.cuda import gemm_geometry as tiling
from ggpass.kernels.cuda import geometry
from ggpass.kernels.cuda.variants import Gemm, Rows, every_linear, linear_variants

GEMMS = [v for v in every_linear("rf8", "bfloat16", 64) if isinstance(v, Gemm)]
ROWS = [Rows("dequantize", "rf8", dtype, aligned) for dtype in ("bfloat16", "float32") for aligned in (True, False)]
LANES = np.arange(geometry.WARP)


def wavefronts(words: np.ndarray, access_words: int) -> int:
    """The most words that any bank is asked for at a time, for addresses (…, lanes) of `access_words` words each.

    A warp's 16-byte accesses go in four parts of 8 lanes, 4-byte ones at once (CUDA's shared memory: 32 banks).
    """
    lanes = 32 // access_words
    parts = words.reshape(-1, lanes)
    touched = parts[:, :, None] + np.arange(access_words)
    worst = 0
    for part in touched:
        distinct = np.unique(part)
        worst = max(worst, int(np.bincount(distinct % 32).max()))
    return worst


def copies(variant: Gemm, units: int, rows: int) -> tuple[np.ndarray, ...]:
    """(row, group, unit) of each copy of a step, in the order of threads."""
    count = rows * units * variant.groups
    assert count % variant.threads == 0
    place, group, unit = tiling.copied_unit(np.arange(count), units, rows)
    return (place if units == geometry.X_UNITS else tiling.neighbours(place)), group, unit


def in_group(variant: Gemm, row: np.ndarray, unit: np.ndarray, codes: bool) -> np.ndarray:
    offset = variant.rows * geometry.X_UNITS * geometry.UNIT_WORDS
    return offset + tiling.code_word(row, unit) if codes else tiling.x_word(row, unit)


@pytest.mark.parametrize("variant", GEMMS, ids=lambda v: v.name)
def test_a_step_copies_each_unit_once_to_a_place_of_its_own(variant: Gemm) -> None:
    places, k_of = [], {True: set(), False: set()}
    for codes, units, rows in ((False, geometry.X_UNITS, variant.rows), (True, geometry.CODE_UNITS, variant.columns)):
        row, group, unit = copies(variant, units, rows)
        size = geometry.STEP // units
        places.append(group * variant.group_words + in_group(variant, row, unit, codes))
        start = tiling.k_of_unit(3, group, unit, variant.groups, size)
        assert row.max() == rows - 1
        k_of[codes] = set(zip(row.tolist(), start.tolist(), strict=True))
        step = geometry.STEP * variant.groups
        assert k_of[codes] == {(r, k) for r in range(rows) for k in range(3 * step, 4 * step, size)}
    words = (np.concatenate(places)[:, None] + np.arange(geometry.UNIT_WORDS)).reshape(-1)
    assert np.array_equal(np.sort(words), np.arange(variant.groups * variant.group_words))


@pytest.mark.parametrize("variant", GEMMS, ids=lambda v: v.name)
def test_a_threads_copies_lie_whole_rows_apart(variant: Gemm) -> None:
    """The kernel adds to a thread's first copy what is the same for all threads."""
    thread = np.arange(variant.threads)
    for codes, units, rows in ((False, geometry.X_UNITS, variant.rows), (True, geometry.CODE_UNITS, variant.columns)):
        row, group, unit = copies(variant, units, rows)
        first, _, first_unit = (part[thread] for part in (row, group, unit))
        for part in range(len(row) // variant.threads):
            below, its_group, zero = tiling.copied_unit(part * variant.threads, units, rows)
            at = part * variant.threads + thread
            assert zero == 0
            assert np.array_equal(row[at], first + below)
            assert (group[at] == its_group).all()
            words = in_group(variant, first, first_unit, codes) + (tiling.code_word if codes else tiling.x_word)(
                below, 0
            )
            assert np.array_equal(in_group(variant, row[at], unit[at], codes), words)


@pytest.mark.parametrize("variant", GEMMS, ids=lambda v: v.name)
def test_no_access_to_shared_memory_meets_in_a_bank(variant: Gemm) -> None:
    for codes, units, rows in ((False, geometry.X_UNITS, variant.rows), (True, geometry.CODE_UNITS, variant.columns)):
        row, group, unit = copies(variant, units, rows)
        assert wavefronts(group * variant.group_words + in_group(variant, row, unit, codes), 4) == 1
    for half in range(2):
        x = tiling.x_word(tiling.row_of_values(np.arange(variant.rows // 8)[:, None], LANES), LANES % 4 * 2 + half)
        codes = tiling.code_word(
            tiling.column_of_sum(np.arange(variant.columns // 16)[:, None], LANES, half), LANES % 4
        )
        assert wavefronts(x, 4) == wavefronts(codes, 4) == 1
        pair = tiling.column_of_sum(np.arange(variant.columns // 16)[:, None], LANES, 0) // 2
        row = tiling.row_of_sum(np.arange(variant.rows // 8)[:, None, None], LANES, half)
        assert wavefronts(tiling.y_word(row, pair, variant.columns), 1) == 1
    units = np.arange(variant.rows * variant.columns // geometry.UNIT_X)
    row, unit = np.divmod(units, variant.columns // geometry.UNIT_X)
    assert wavefronts(tiling.y_word(row, unit * geometry.UNIT_WORDS, variant.columns), 4) == 1


def test_the_count_sees_conflicts() -> None:
    row = tiling.row_of_values(np.arange(16)[:, None], LANES)
    assert wavefronts((row * geometry.X_UNITS + LANES % 4 * 2) * geometry.UNIT_WORDS, 4) == 2
    assert wavefronts(LANES * 32, 1) == 32


@pytest.mark.parametrize("variant", GEMMS, ids=lambda v: v.name)
def test_weights_and_activations_of_a_product_have_the_same_k(variant: Gemm) -> None:
    """Word j of a chunk is codes 4j to 4j + 3; words 2j and 2j + 1 of a lane's activations the same."""
    for half in range(2):
        for j in range(2):
            code = geometry.quad(LANES) * geometry.CHUNK + (half * 2 + j) * 4
            unit = geometry.quad(LANES) * 2 + half
            assert np.array_equal(code, unit * geometry.UNIT_X + 4 * j)


@pytest.mark.parametrize("variant", GEMMS, ids=lambda v: v.name)
@pytest.mark.parametrize(("m", "n"), [(1, 1), (70, 131), (129, 64), (1300, 257), (2048, 128)])
def test_each_output_has_one_sum(variant: Gemm, m: int, n: int) -> None:
    x, y, z = variant.launch(m, n, 64).grid
    in_bundle, column_block, bundle = (a.reshape(-1) for a in np.meshgrid(*map(np.arange, (x, y, z)), indexing="ij"))
    first_row = tiling.row_block(bundle, in_bundle) * variant.rows
    first_column = column_block * variant.columns
    tiles = np.arange(variant.rows // 8)[:, None, None]
    columns = np.arange(variant.columns // 16)[:, None]
    counts = np.zeros((m, n), np.int64)
    for i in range(2):
        for part in range(2):
            rows = (first_row[:, None, None, None] + tiling.row_of_sum(tiles, LANES, i)).reshape(
                len(first_row), -1, 1, 32
            )
            cols = first_column[:, None, None] + tiling.column_of_sum(columns, LANES, part)
            rows, cols = np.broadcast_arrays(rows, cols[:, None])
            inside = (rows < m) & (cols < n)
            np.add.at(counts, (rows[inside], cols[inside]), 1)
    assert (counts == 1).all()
    steps = tiling.steps(64 * variant.groups + 1, variant.groups, first_row, m)
    assert np.array_equal(steps, np.where(first_row < m, 2, 0))


@pytest.mark.parametrize("variant", GEMMS, ids=lambda v: v.name)
def test_the_tile_of_y_has_a_word_for_each_pair(variant: Gemm) -> None:
    row, pair = np.divmod(np.arange(variant.rows * variant.columns // 2), variant.columns // 2)
    words = tiling.y_word(row, pair, variant.columns)
    assert np.array_equal(np.sort(words), np.arange(words.size))
    assert variant.exchange_words + words.size <= variant.ring_words


@pytest.mark.parametrize("variant", ROWS, ids=lambda v: v.name)
@pytest.mark.parametrize(("m", "k"), [(1, 8), (3, 40), (1023, 16), (1025, 24), (2500, 8)])
def test_each_code_is_decoded_once(variant: Rows, m: int, k: int) -> None:
    blocks, panels, _ = variant.launch(m, m, k).grid
    units = k // variant.unit
    block, part, thread = np.ix_(np.arange(blocks), np.arange(geometry.ROW_PARTS), np.arange(geometry.ROW_THREADS))
    index = geometry.unit_index(block, part, thread).reshape(-1)
    counts = np.zeros((m, k), np.int64)
    for panel in range(panels):
        there = geometry.exists(index, panel, units, m)
        row = geometry.row_of_unit(index[there], panel, units)
        start = geometry.start_of_unit(index[there], units, variant.unit)
        for i in range(variant.unit):
            np.add.at(counts, (row, start + i), 1)
    assert (counts == 1).all()


@pytest.mark.parametrize("shared", [99 << 10, 163 << 10])
def test_a_variant_fits_the_device(shared: int) -> None:
    for m in (1, 17, 64, 65, 512, 4096):
        found = linear_variants("table", "float16", m, 4096, 4096, shared)
        assert found
        assert all(variant.launch(m, 4096, 4096).shared <= shared for variant in found)
        assert {v.name for v in found} <= {v.name for v in every_linear("table", "float16", 4096)}
