# mypy: ignore-errors
"""y[m, n] = scale[n] · Σ_k x[m, k] · w[n, k] + bias[n] for many m: codes are decoded between shared memory and mma."""

from __future__ import annotations

from itertools import product

from tvm.script import tirx as T

from ggpass.kernels.cuda import gemm_geometry as tiling
from ggpass.kernels.cuda import geometry
from ggpass.kernels.cuda.generate.device import Device, decoder
from ggpass.kernels.cuda.geometry import (
    CHUNK,
    CODE_UNITS,
    ROWS_B,
    STEP,
    TOGETHER,
    UNIT_WORDS,
    UNIT_X,
    WARP,
    WARP_TILES,
    X_UNITS,
)  # fmt: skip
from ggpass.kernels.cuda.variants import Gemm


def gemm_kernel(variant: Gemm):
    """Return the kernel of one variant; dynamic in M, N and K.

    Copies run `stages` - 1 steps ahead of the products, with one barrier a step: it says both that the step's copies
    have come and that everybody has left the place that the next copies fill.

    For 64 of k a warp with 128 rows of x issues, in the machine code of sm_80 to sm_100, 128 tensor-core instructions
    among 540 to 580, some 270 of them to decode 2048 codes, and 36 loads from shared memory; nothing is spilled. On
    sm_80 the former take 1024 cycles of a scheduler's tensor core, the latter 530 of its integer unit: decoding hides
    behind the products. With 64 rows of x it takes as long as they do.
    """
    device = Device(variant.dtype, variant.aligned)
    rows, columns, groups, stages, threads = (
        variant.rows, variant.columns, variant.groups, variant.stages, variant.threads,
    )  # fmt: skip
    x_tiles = rows // ROWS_B

    def place(stage, group):
        """First word of a group's step in the ring."""
        return (stage * groups + group) * variant.group_words

    def copy_rows(shared, source, i, thread, first, limit, k, units: int, offset: int, block_rows: int):
        """Begin the copies of the block's i-th step of x or of the codes; rows beyond `limit` and k become zero.

        Places are counted from the block's first row, `source`: with 64 bits each they would take registers in pairs.
        The numbers that they follow from are `fresh` in each step: places kept from step to step made others spill.
        """
        size, word = (UNIT_X, tiling.x_word) if units == X_UNITS else (CHUNK, tiling.code_word)
        place_of_row, _, unit = map(T.bind, tiling.copied_unit(thread, units, block_rows))
        row = T.bind(place_of_row if units == X_UNITS else tiling.neighbours(place_of_row))
        start = T.bind(tiling.k_of_unit(i, 0, unit, groups, size))
        width, rows_left = T.bind(device.fresh(k)), T.bind(device.fresh(limit - first - row))
        index = T.bind(device.fresh(row * k + start))
        for part in range(block_rows * units * groups // threads):
            # A thread's copies lie whole rows apart, and its groups whole steps.
            below, group, _ = tiling.copied_unit(part * threads, units, block_rows)
            to = shared[place(i % stages, group) + offset + word(row, unit) + word(below, 0)]
            address = device.at(source, index + below * width + group * STEP, CHUNK // size)
            count = geometry.inside(below, rows_left, start + group * STEP, k) * (CHUNK // size)
            T.evaluate(device.copy(T.address_of(to), address, count))

    def copy_step(shared, codes, x, i, thread, first_row, first_column, m, n, k):
        copy_rows(shared, x, i, thread, first_row, m, k, X_UNITS, 0, rows)
        copy_rows(shared, codes, i, thread, first_column, n, k, CODE_UNITS, rows * X_UNITS * UNIT_WORDS, columns)
        T.evaluate(device.commit())

    def multiply_step(sums, shared, decoding, i, group, column_warp, lane):
        """Word j of the chunks of two rows of codes is an A fragment; words 2j and 2j + 1 of a row of x are B's.

        With the weights as A no word is moved: decoding leaves its four words where they are wanted, and B's two lie
        side by side in what a load of x returns.
        """
        chunks = T.alloc_buffer((WARP_TILES * 2 * 4,), "uint32", scope="local")
        weights = T.alloc_buffer((WARP_TILES * 2 * 4,), "uint32", scope="local")
        values = T.alloc_buffer((x_tiles * 4,), "uint32", scope="local")
        base = T.bind(place(i % stages, group))
        quad = T.bind(geometry.quad(lane))
        for tile in range(WARP_TILES):
            for part in range(2):
                row = tiling.column_of_sum(column_warp * WARP_TILES + tile, lane, part)
                at = base + rows * X_UNITS * UNIT_WORDS + tiling.code_word(row, quad)
                T.buffer_store(chunks, shared[T.ramp(at, 1, 4)], [T.ramp((tile * 2 + part) * 4, 1, 4)])
        for half in range(2):
            for tile, j, part in product(range(WARP_TILES), range(2), range(2)):
                word = chunks[(tile * 2 + part) * 4 + half * 2 + j]
                decoding.decode(weights, ((tile * 2 + j) * 2 + part) * 2, word)
            for x_tile in range(x_tiles):
                at = base + tiling.x_word(tiling.row_of_values(x_tile, lane), quad * 2 + half)
                T.buffer_store(values, shared[T.ramp(at, 1, 4)], [T.ramp(x_tile * 4, 1, 4)])
                for j, tile in product(range(2), range(WARP_TILES)):
                    a = [weights[((tile * 2 + j) * 2 + part) * 2 + i] for i in range(2) for part in range(2)]
                    b = [values[x_tile * 4 + 2 * j + i] for i in range(2)]
                    T.evaluate(device.mma(T.address_of(sums[(x_tile * WARP_TILES + tile) * 4]), a, b))

    def add_groups(sums, shared, warp, group, column_warp, lane):
        """sums of group 0 += those of the other warps that have the same columns, in the same order always."""
        count = variant.sums
        with T.If(group > 0), T.Then():
            for i in range(count):
                to = ((warp - variant.column_warps) * count + i) * WARP + lane
                T.buffer_store(shared, T.reinterpret("uint32", sums[i]), [to])
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(group == 0), T.Then():
            for other in range(groups - 1):
                for i in range(count):
                    at = ((other * variant.column_warps + column_warp) * count + i) * WARP + lane
                    T.buffer_store(sums, sums[i] + T.reinterpret("float32", shared[at]), [i])

    def round_tile(sums, shared, scale, bias, group, column_warp, first_column, lane, n, scale_stride, bias_on):
        """Scale, bias, rounding; pairs of columns into the block's tile of y in shared memory."""
        factors = T.alloc_buffer((4,), "float32", scope="local")
        with T.If(group == 0), T.Then():
            for tile in range(WARP_TILES):
                column = T.bind(first_column + tiling.column_of_sum(column_warp * WARP_TILES + tile, lane, 0))
                pair = T.bind(tiling.column_of_sum(column_warp * WARP_TILES + tile, lane, 0) // 2)
                for part in range(2):
                    known = column + part < n
                    factor = T.if_then_else(known, scale[(column + part) * scale_stride], T.float32(0))
                    shift = T.if_then_else(T.And(known, bias_on != 0), bias[column + part], T.float32(0))
                    T.buffer_store(factors, factor, [part])
                    T.buffer_store(factors, shift, [2 + part])
                for x_tile, i in product(range(x_tiles), range(2)):
                    at = (x_tile * WARP_TILES + tile) * 4 + i
                    bits = [device.round(sums[at + part * 2] * factors[part] + factors[2 + part]) for part in range(2)]
                    low, high = (T.cast(b, "uint32") for b in bits)
                    to = variant.exchange_words + tiling.y_word(tiling.row_of_sum(x_tile, lane, i), pair, columns)
                    T.buffer_store(shared, low | (high << T.uint32(16)), [to])

    def store_tile(shared, y, thread, first_row, first_column, m, n):
        """Return the tile to y: 16 bytes a thread where rows of y begin at 16 bytes, else 2 bytes."""
        with T.If(n % UNIT_X == 0):
            with T.Then():
                for part in range(rows * columns // UNIT_X // threads):
                    index = T.bind(part * threads + thread)
                    row, unit = T.bind(index // (columns // UNIT_X)), T.bind(index % (columns // UNIT_X))
                    to_row, column = T.bind(first_row + row), T.bind(first_column + unit * UNIT_X)
                    with T.If(T.And(to_row < m, column < n)), T.Then():
                        at = variant.exchange_words + tiling.y_word(row, unit * UNIT_WORDS, columns)
                        to = y[T.cast(to_row, "int64") * n + column]
                        T.evaluate(device.store(T.address_of(to), T.address_of(shared[at])))
            with T.Else():
                with T.serial(rows * columns // threads) as part:
                    index = T.bind(part * threads + thread)
                    row, column = T.bind(index // columns), T.bind(index % columns)
                    to_row, to_column = T.bind(first_row + row), T.bind(first_column + column)
                    with T.If(T.And(to_row < m, to_column < n)), T.Then():
                        word = shared[variant.exchange_words + tiling.y_word(row, column // 2, columns)]
                        value = T.cast(word >> T.cast(column % 2 * 16, "uint32"), "uint16")
                        T.buffer_store(y, value, [T.cast(to_row, "int64") * n + to_column])

    def body(
        shared, sums, decoding, x, codes, scale, bias, y, thread, bundle, in_bundle, column_block,
        m, n, k, scale_stride, bias_on,
    ):  # fmt: skip
        first_row, first_column = (
            T.bind(tiling.row_block(bundle, in_bundle) * rows), T.bind(column_block * columns)
        )  # fmt: skip
        warp, lane = T.bind(thread // WARP), T.bind(thread % WARP)
        group, column_warp = T.bind(warp // variant.column_warps), T.bind(warp % variant.column_warps)
        codes_from = T.bind(T.address_of(codes[T.cast(first_column, "int64") * k]))
        x_from = T.bind(T.address_of(x[T.cast(first_row, "int64") * k]))
        for i in range(stages - 1):
            copy_step(shared, codes_from, x_from, i, thread, first_row, first_column, m, n, k)
        with T.serial(tiling.steps(k, groups, first_row, m)) as i:
            T.evaluate(device.wait(stages - 2))
            T.evaluate(T.tvm_storage_sync("shared"))
            copy_step(shared, codes_from, x_from, i + (stages - 1), thread, first_row, first_column, m, n, k)
            multiply_step(sums, shared, decoding, i, group, column_warp, lane)
        T.evaluate(device.wait(0))
        T.evaluate(T.tvm_storage_sync("shared"))
        if groups > 1:
            add_groups(sums, shared, warp, group, column_warp, lane)
        round_tile(sums, shared, scale, bias, group, column_warp, first_column, lane, n, scale_stride, bias_on)
        T.evaluate(T.tvm_storage_sync("shared"))
        store_tile(shared, y, thread, first_row, first_column, m, n)

    @T.prim_func(s_tir=True)
    def gemm(
        x_p: T.handle, codes_p: T.handle, scale_p: T.handle, codebook_p: T.handle, bias_p: T.handle, y_p: T.handle,
        m: T.int32, n: T.int32, k: T.int32, scale_stride: T.int32, bias_on: T.int32,
    ):  # fmt: skip
        x_size = T.int64()
        size = T.int64()
        scales = T.int64()
        bias_rows = T.int64()
        y_size = T.int64()
        x = T.match_buffer(x_p, (x_size,), "uint16", align=16)
        codes = T.match_buffer(codes_p, (size,), "uint8", align=16)
        scale = T.match_buffer(scale_p, (scales,), "float32", align=4)
        codebook = T.match_buffer(codebook_p, (256,), "float32", align=4)
        bias = T.match_buffer(bias_p, (bias_rows,), "float32", align=4)
        y = T.match_buffer(y_p, (y_size,), "uint16", align=16)
        in_bundle = T.launch_thread("blockIdx.x", TOGETHER)
        column_block = T.launch_thread("blockIdx.y", geometry.ceil_div(n, columns))
        bundle = T.launch_thread("blockIdx.z", geometry.ceil_div(m, rows * TOGETHER))
        thread = T.launch_thread("threadIdx.x", threads)
        shared = T.alloc_buffer((variant.launch(1, 1, 1).shared // 4,), "uint32", scope="shared.dyn")
        sums = T.alloc_buffer((variant.sums,), "float32", scope="local")
        for i in T.unroll(variant.sums):
            sums[i] = T.float32(0)
        decoding = T.meta_var(decoder(device, variant.decoder, shared, variant.ring_words, codebook, thread, threads))
        body(
            shared, sums, decoding, x, codes, scale, bias, y, thread, bundle, in_bundle, column_block,
            m, n, k, scale_stride, bias_on,
        )  # fmt: skip

    return gemm.with_attr("tirx.noalias", True)
