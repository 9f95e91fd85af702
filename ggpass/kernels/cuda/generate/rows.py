# mypy: ignore-errors
"""y[i, k] = round(codebook[codes[r, k]] · scale[r]) with r = ids[i] (embedding) or r = i (dequantize)."""

from __future__ import annotations

from tvm.script import tirx as T

from ggpass.kernels.cuda import geometry
from ggpass.kernels.cuda.generate.device import Device
from ggpass.kernels.cuda.geometry import COPIES, PANEL, ROW_PARTS, ROW_THREADS, ceil_div
from ggpass.kernels.cuda.variants import Rows


def rows_kernel(variant: Rows):
    """Return the kernel of one variant; dynamic in M, N and K.

    A convolution is computed from what "dequantize" gives, by torch: each weight serves all pixels, so that decoding
    them once is little beside the products, while gathering x for a GEMM of codes would be much.

    Products are formed in float32 and rounded once; RF8's values are exact in bfloat16, which is what they are decoded
    to on the way, whatever the output's dtype. The row of an id outside [0, N) is NaN: stopping the device would take
    every other tensor of the process with it, and nothing outside the codes is read.
    """
    device = Device("bfloat16")
    unit, words = variant.unit, (variant.unit + 3) // 4
    lookup = variant.decoder == "table"

    def fill_table(shared, codebook, thread):
        with T.serial(256 * COPIES // ROW_THREADS) as i:
            at = T.bind(i * ROW_THREADS + thread)
            T.buffer_store(shared, T.reinterpret("uint32", codebook[at // COPIES]), [at])
        T.evaluate(T.tvm_storage_sync("shared"))

    def values(weights, shared, table, word, thread):
        """Return the four float32 values of a word of codes."""
        if lookup:
            bytes_ = [(word >> T.uint32(8 * i)) & T.uint32(255) for i in range(4)]
            places = [T.cast(b, "int32") * COPIES + thread % COPIES for b in bytes_]
            return [T.reinterpret("float32", shared[place]) for place in places]
        T.evaluate(device.decode_rf8(T.address_of(weights[0]), word, table))
        pairs = [(weights[i] << T.uint32(16), weights[i] & T.uint32(0xFFFF0000)) for i in range(2)]
        return [T.reinterpret("float32", bits) for pair in pairs for bits in pair]

    def store(y, at, outputs, results):
        """`unit` results to y, 16 bytes or one of them."""
        if unit == 1:
            T.buffer_store(y, results[0], [at])
            return
        if variant.dtype == "float32":
            packed = [T.reinterpret("uint32", value) for value in results]
        else:
            wide = [T.cast(value, "uint32") for value in results]
            packed = [wide[2 * i] | (wide[2 * i + 1] << T.uint32(16)) for i in range(4)]
        for i in range(4):
            T.buffer_store(outputs, packed[i], [i])
        T.evaluate(device.store(T.address_of(y[at]), T.address_of(outputs[0])))

    def source_row(ids, row, n):
        """(row of codes, whether there is one) for a row of outputs."""
        if variant.family == "dequantize":
            return row, T.bool(True)
        where = T.bind(ids[row])
        return where, T.And(where >= T.int64(0), where < T.cast(n, "int64"))

    def part_of(ids, codes, scale, loaded, factors, part, block, panel, thread, rows, n, k, scale_stride):
        """Load a part's codes and its factor; returns whether it exists and where its outputs go."""
        units = T.bind(k // unit)
        index = T.bind(geometry.unit_index(block, part, thread))
        row, start = geometry.row_of_unit(index, panel, units), geometry.start_of_unit(index, units, unit)
        row, start = T.bind(row), T.bind(start)
        there = T.bind(geometry.exists(index, panel, units, rows))
        with T.If(there), T.Then():
            at, known = source_row(ids, row, n)
            address = T.address_of(codes[T.cast(at, "int64") * k + start])
            T.evaluate(device.load(T.address_of(loaded[part * words]), address, unit, T.cast(known, "int32")))
            factor = T.if_then_else(
                known, scale[T.cast(at, "int64") * scale_stride], T.reinterpret("float32", T.uint32(0x7FC00000))
            )
            T.buffer_store(factors, factor, [part])
        return there, T.cast(row, "int64") * k + start

    def body(shared, ids, codes, scale, codebook, y, block, panel, thread, rows, n, k, scale_stride):
        loaded = T.alloc_buffer((ROW_PARTS * words,), "uint32", scope="local")
        factors = T.alloc_buffer((ROW_PARTS,), "float32", scope="local")
        weights = T.alloc_buffer((2,), "uint32", scope="local")
        outputs = T.alloc_buffer((4,), "uint32", scope="local")
        if lookup:
            fill_table(shared, codebook, thread)
        table = None if lookup else T.bind(device.rf8_table())
        of_row = (block, panel, thread, rows, n, k, scale_stride)
        parts = [part_of(ids, codes, scale, loaded, factors, part, *of_row) for part in range(ROW_PARTS)]
        for part, (there, at) in enumerate(parts):
            with T.If(there), T.Then():
                decoded = []
                for word in range(words):
                    code = values(weights, shared, table, loaded[part * words + word], thread)
                    decoded += [T.bind(value * factors[part]) for value in code]
                store(y, at, outputs, [_rounded(variant.dtype, value) for value in decoded[:unit]])

    @T.prim_func(s_tir=True)
    def decode_rows(
        ids_p: T.handle, codes_p: T.handle, scale_p: T.handle, codebook_p: T.handle, y_p: T.handle,
        m: T.int32, n: T.int32, k: T.int32, scale_stride: T.int32,
    ):  # fmt: skip
        count = T.int64()
        size = T.int64()
        scales = T.int64()
        y_size = T.int64()
        ids = T.match_buffer(ids_p, (count,), "int64", align=8)
        codes = T.match_buffer(codes_p, (size,), "uint8", align=16)
        scale = T.match_buffer(scale_p, (scales,), "float32", align=4)
        codebook = T.match_buffer(codebook_p, (256,), "float32", align=4)
        y = T.match_buffer(y_p, (y_size,), "float32" if variant.dtype == "float32" else "uint16", align=16)
        block = T.launch_thread("blockIdx.x", ceil_div(k * PANEL, ROW_THREADS * ROW_PARTS))
        panel = T.launch_thread("blockIdx.y", ceil_div(m, PANEL))
        thread = T.launch_thread("threadIdx.x", ROW_THREADS)
        shared = T.alloc_buffer((256 * COPIES if lookup else 1,), "uint32", scope="shared.dyn")
        body(shared, ids, codes, scale, codebook, y, block, panel, thread, m, n, k, scale_stride)

    return decode_rows.with_attr("tirx.noalias", True)


def _rounded(dtype: str, value):
    return value if dtype == "float32" else Device(dtype).round(value)
