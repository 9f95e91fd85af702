# mypy: ignore-errors
"""y[m, n] = scale[n] · Σ_k x[m, k] · w[n, k] + bias[n] for few m: each code is loaded and decoded once."""

from __future__ import annotations

from itertools import product

from tvm.script import tirx as T

from ggpass.kernels.cuda import geometry
from ggpass.kernels.cuda.generate.device import Device, decoder
from ggpass.kernels.cuda.geometry import CHUNK, ROWS_B, STEP, WARP
from ggpass.kernels.cuda.variants import Small


def small_kernel(variant: Small):
    """Return the kernel of one variant; dynamic in M, N and K.

    A warp takes every `warps`-th step of 64 codes. A lane copies the chunks that it will multiply itself, so that the
    ring in shared memory needs no barrier: it is there because loads into registers are moved next to their use by the
    assembler, where every one is waited for.
    """
    device = Device(variant.dtype, variant.aligned)
    tiles, row_parts, row_tiles, warps = variant.tiles, variant.row_parts, variant.row_tiles, variant.warps
    stages, parts, sums_count, columns = variant.stages, variant.parts, variant.sums, variant.tiles * ROWS_B

    def place(warp, stage, part: int, lane):
        return geometry.ring_place(warp, stage, part, lane, stages, parts)

    def copy_step(shared, codes, x, i, first_tile, first_row, warp, lane, m, n, k):
        """Begin the copies of the warp's i-th step."""
        start = T.bind(geometry.chunk_start(geometry.step_of(i, warp, warps), lane))
        for tile in range(tiles):
            row = T.bind(geometry.row_of_codes(first_tile + tile, lane))
            to, address = place(warp, i % stages, tile, lane), codes[T.cast(row, "int64") * k + start]
            T.evaluate(device.copy(T.address_of(shared[to]), T.address_of(address), geometry.inside(row, n, start, k)))
        for part in range(row_parts):
            row = T.bind(first_row + geometry.row_of_x(part // 2, lane, part % 2))
            count = T.bind(geometry.inside(row, m, start, k))
            for half in range(2):
                to = place(warp, i % stages, tiles + part * 2 + half, lane)
                first, size = geometry.half_of_x(start, count, half)
                address = x[T.cast(row, "int64") * k + first]
                T.evaluate(device.copy(T.address_of(shared[to]), T.address_of(address), size))
        T.evaluate(device.commit())

    def decode_chunk(weights, shared, decoding, tile: int, i, warp, lane):
        """weights[2j : 2j + 2] = word j of the lane's chunk of a tile."""
        chunk = T.alloc_buffer((4,), "uint32", scope="local")
        T.buffer_store(chunk, shared[T.ramp(place(warp, i % stages, tile, lane), 1, 4)], [T.ramp(0, 1, 4)])
        for j in range(CHUNK // 4):
            decoding.decode(weights, 2 * j, chunk[j])

    def multiply_paired(sums, values, weights, tile: int):
        """For up to 16 rows of x: four words of a row, as they lie in registers, are the A fragment.

        Its rows 0 to 7 then hold words 0 and 2, and its rows 8 to 15 words 1 and 3 of the same rows of x. Two products,
        each with its half of the weights, give the one in the upper rows of its sums and the other in the lower ones:
        twice the products, which cost less here than moving the words of two rows together.
        """
        for part in range(row_parts):
            for quarter in range(2):
                x = [values[part * 8 + quarter * 4 + i] for i in range(4)]
                for odd in range(2):
                    w = [weights[quarter * 4 + 2 * i + odd] for i in range(2)]
                    T.evaluate(device.mma(T.address_of(sums[((part * tiles + tile) * 2 + odd) * 4]), x, w))

    def multiply_rows(sums, values, weights, tile: int):
        """For more rows: words 2j and 2j + 1 of two rows of x are the A fragment, word j of codes the B fragment."""
        for row_tile in range(row_tiles):
            for j in range(CHUNK // 4):
                x = [values[(row_tile * 2 + half) * 8 + 2 * j + i] for i in range(2) for half in range(2)]
                where = T.address_of(sums[(row_tile * tiles + tile) * 4])
                T.evaluate(device.mma(where, x, [weights[2 * j + i] for i in range(2)]))

    def multiply_step(sums, shared, decoding, i, warp, lane):
        """Multiply the chunks of the warp's i-th step."""
        values = T.alloc_buffer((row_parts * 8,), "uint32", scope="local")
        weights = T.alloc_buffer((8,), "uint32", scope="local")
        for part in range(row_parts * 2):
            at = T.bind(place(warp, i % stages, tiles + part, lane))
            T.buffer_store(values, shared[T.ramp(at, 1, 4)], [T.ramp(part * 4, 1, 4)])
        for tile in range(tiles):
            decode_chunk(weights, shared, decoding, tile, i, warp, lane)
            (multiply_paired if variant.paired else multiply_rows)(sums, values, weights, tile)

    def total(sums, part: int, tile: int, i: int):
        """Return the sum of row g of a part of x and column 2t + i of a tile of codes."""
        if variant.paired:
            at = (part * tiles + tile) * 8
            return sums[at + i] + sums[at + 6 + i]
        return sums[((part // 2) * tiles + tile) * 4 + (part % 2) * 2 + i]

    def finish(sums, shared, scale, bias, y, first_tile, first_row, warp, lane, thread, m, n, scale_stride, bias_on):
        """Add the warps' sums, then scale, bias and rounding, one output a thread at a time."""
        T.evaluate(device.wait(0))
        T.evaluate(T.tvm_storage_sync("shared"))
        for part, tile, i in product(range(row_parts), range(tiles), range(2)):
            at = geometry.warp_sums(warp, sums_count) + geometry.sum_place(part, tile, tiles, i, lane)
            T.buffer_store(shared, T.reinterpret("uint32", total(sums, part, tile, i)), [at])
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.serial(geometry.ceil_div(variant.rows * columns, variant.threads)) as i:
            row, column = map(T.bind, geometry.output_of(i, thread, variant.threads, columns))
            to_row, to_column = T.bind(first_row + row), T.bind(first_tile * ROWS_B + column)
            with T.If(T.And(T.And(row < variant.rows, to_row < m), to_column < n)), T.Then():
                where = T.bind(geometry.output_place(row, column, tiles))
                value = T.alloc_buffer((1,), "float32", scope="local")
                T.buffer_store(value, T.float32(0), [0])
                with T.unroll(warps) as w:
                    term = T.reinterpret("float32", shared[geometry.warp_sums(w, sums_count) + where])
                    T.buffer_store(value, value[0] + term, [0])
                scaled = value[0] * scale[to_column * scale_stride]
                scaled = scaled + T.if_then_else(bias_on != 0, bias[to_column], T.float32(0))
                T.buffer_store(y, device.round(scaled), [T.cast(to_row, "int64") * n + to_column])

    def body(
        shared, sums, decoding, x, codes, scale, bias, y, thread, first_tile, first_row, m, n, k, scale_stride, bias_on
    ):
        warp, lane = T.bind(thread // WARP), T.bind(thread % WARP)
        for i in range(stages - 1):
            copy_step(shared, codes, x, i, first_tile, first_row, warp, lane, m, n, k)
        with T.serial(geometry.ceil_div(k, STEP * warps)) as i:
            T.evaluate(device.wait(stages - 2))
            # Into the place of the step before this one, which this lane has read.
            copy_step(shared, codes, x, i + (stages - 1), first_tile, first_row, warp, lane, m, n, k)
            multiply_step(sums, shared, decoding, i, warp, lane)
        finish(sums, shared, scale, bias, y, first_tile, first_row, warp, lane, thread, m, n, scale_stride, bias_on)

    @T.prim_func(s_tir=True)
    def small(
        x_p: T.handle, codes_p: T.handle, scale_p: T.handle, codebook_p: T.handle, bias_p: T.handle, y_p: T.handle,
        m: T.int32, n: T.int32, k: T.int32, scale_stride: T.int32, bias_on: T.int32,
    ):  # fmt: skip
        x_size = T.int64()
        size = T.int64()
        rows = T.int64()
        bias_rows = T.int64()
        y_size = T.int64()
        x = T.match_buffer(x_p, (x_size,), "uint16", align=16)
        codes = T.match_buffer(codes_p, (size,), "uint8", align=16)
        scale = T.match_buffer(scale_p, (rows,), "float32", align=4)
        codebook = T.match_buffer(codebook_p, (256,), "float32", align=4)
        bias = T.match_buffer(bias_p, (bias_rows,), "float32", align=4)
        y = T.match_buffer(y_p, (y_size,), "uint16", align=2)
        column_block = T.launch_thread("blockIdx.x", geometry.ceil_div(n, columns))
        row_block = T.launch_thread("blockIdx.y", geometry.ceil_div(m, variant.rows))
        thread = T.launch_thread("threadIdx.x", variant.threads)
        shared = T.alloc_buffer((variant.launch(1, 1, 1).shared // 4,), "uint32", scope="shared.dyn")
        sums = T.alloc_buffer((variant.accumulators,), "float32", scope="local")
        for i in T.unroll(variant.accumulators):
            sums[i] = T.float32(0)
        decoding = T.meta_var(
            decoder(device, variant.decoder, shared, variant.ring_words, codebook, thread, variant.threads)
        )
        body(
            shared, sums, decoding, x, codes, scale, bias, y, thread, column_block * tiles, row_block * variant.rows,
            m, n, k, scale_stride, bias_on,
        )  # fmt: skip

    return small.with_attr("tirx.noalias", True)
