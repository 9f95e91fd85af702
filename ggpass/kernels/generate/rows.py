# mypy: ignore-errors
"""y[m, n] = scale[n] · Σ_k x[m, k] · w[n, k] + bias[n] for few m: each weight is decoded once, in registers."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from ggpass.kernels.generate.decoders import Decoder
from ggpass.kernels.generate.vectors import Registers, horizontal_sum, prefetch, shuffle
from ggpass.kernels.isa import Isa

#: Codes of one cache line; every loop over k goes line by line, and K is at least this.
LINE = 64


@dataclass(frozen=True)
class RowsShape:
    """How one `rows` kernel is blocked.

    `batch` rows of x share each decoded weight; `streams` rows of codes, N / streams apart, are read at a time
    (far-apart streams keep more DRAM banks and prefetchers busy than adjacent ones); `chains` independent sums
    for each output hide the latency of the fused multiply-add; `ahead` is the prefetch distance in bytes.
    """

    batch: int
    streams: int
    chains: int
    ahead: int


def _pack(x, packed, decoder: Decoder, rows, batch: int, k_total):
    """packed[tile, line, v, m, j] = x[m, k of lane j of vector v], so that the kernel reads straight ahead."""
    isa, order, step = decoder.isa, decoder.order, decoder.isa.code_bytes
    steps = LINE // step

    def slot(m, line, u: int, v: int):
        tile_lines = (k_total + (LINE - 1)) // LINE
        vector = ((m // batch * tile_lines + line) * steps + u) * 4 + v
        return (vector * batch + m % batch) * isa.lanes

    with T.serial(rows) as m:
        with T.serial(k_total // LINE) as line:
            for u in range(steps):
                natural = T.bind(x[m, T.ramp(line * LINE + u * step, 1, step)])
                for v in range(4):
                    lanes = order[v * isa.lanes : (v + 1) * isa.lanes]
                    where = T.ramp(slot(m, line, u, v), 1, isa.lanes)
                    T.buffer_store(packed, shuffle([natural], lanes), [where])
        # The last line of a row overlaps the one before: no code outside the row is read, and none counts twice.
        with T.If(k_total % LINE != 0), T.Then():
            for u in range(steps):
                for lane, k in enumerate(order):
                    inside = k + u * step >= LINE - k_total % LINE
                    position = T.max(k_total - LINE + u * step + k, 0)
                    where = slot(m, k_total // LINE, u, lane // isa.lanes) + lane % isa.lanes
                    T.buffer_store(packed, T.if_then_else(inside, x[m, position], T.float32(0)), [where])


def rows_kernel(isa: Isa, decoder: Decoder, shape: RowsShape):
    """The kernel for one instruction set, format and blocking; dynamic in M, N and K >= 64.

    `packed` is a workspace of ceil(M / batch) · batch · ceil(K / 64) · 64 floats.
    """
    batch, streams, chains, lanes = shape.batch, shape.streams, shape.chains, isa.lanes
    steps = LINE // isa.code_bytes

    def line(sums, constants, codes, packed, rows, k, position):
        for row in rows:
            prefetch(T.address_of(codes[row, k + shape.ahead]))
        for u in range(steps):
            for s, row in enumerate(rows):
                weights = decoder.decode(codes[row, T.ramp(k + u * isa.code_bytes, 1, isa.code_bytes)], constants)
                for v, weight in enumerate(weights):
                    weight = T.bind(weight) if batch > 1 else weight
                    for m in range(batch):
                        where = position + ((u * 4 + v) * batch + m) * lanes
                        sums.fma((s * batch + m) * chains + v % chains, weight, packed[T.ramp(where, 1, lanes)])

    def store(sums, y, scale, bias, row, s: int, first, count):
        for m in range(batch):
            base = (s * batch + m) * chains
            total = sums.get(base)
            for c in range(1, chains):
                total = T.bind(total + sums.get(base + c))
            value = horizontal_sum(total, lanes)
            with T.If(T.And(row[1], first + m < count)), T.Then():
                T.buffer_store(y, value * scale[row[0]] + bias[row[0]], [first + m, row[0]])

    def body(x, packed, codes, scale, bias, codebook, y, m_total, n_total, k_total):
        _pack(x, packed, decoder, m_total, batch, k_total)
        apart = T.bind((n_total + (streams - 1)) // streams)
        lines = T.bind((k_total + (LINE - 1)) // LINE)
        with T.parallel(apart) as i:
            constants = decoder.setup(codebook)
            # A row past the end is read as the last row and not stored.
            rows = [T.bind(T.min(i + s * apart, n_total - 1)) for s in range(streams)]
            kept = [(row, i + s * apart < n_total) for s, row in enumerate(rows)]
            with T.serial((m_total + (batch - 1)) // batch) as tile:
                sums = Registers(isa, streams * batch * chains)
                sums.clear()
                base = T.bind(tile * lines * (LINE * batch))
                with T.serial(k_total // LINE) as g:
                    line(sums, constants, codes, packed, rows, g * LINE, base + g * (LINE * batch))
                with T.If(k_total % LINE != 0), T.Then():
                    last = base + (k_total // LINE) * (LINE * batch)
                    line(sums, constants, codes, packed, rows, k_total - LINE, last)
                for s, row in enumerate(kept):
                    store(sums, y, scale, bias, row, s, tile * batch, m_total)

    @T.prim_func(s_tir=True)
    def rows(
        x_p: T.handle, packed_p: T.handle, codes_p: T.handle, scale_p: T.handle, bias_p: T.handle,
        codebook_p: T.handle, y_p: T.handle,
    ):  # fmt: skip
        m = T.int64()
        n = T.int64()
        k = T.int64()
        x_stride = T.int64()
        code_stride = T.int64()
        scale_stride = T.int64()
        bias_stride = T.int64()
        size = T.int64()
        x = T.match_buffer(x_p, (m, k), "float32", strides=[x_stride, T.int64(1)], align=4)
        packed = T.match_buffer(packed_p, (size,), "float32", align=4)
        codes = T.match_buffer(codes_p, (n, k), "uint8", strides=[code_stride, T.int64(1)], align=1)
        scale = T.match_buffer(scale_p, (n,), "float32", strides=[scale_stride], align=4)
        bias = T.match_buffer(bias_p, (n,), "float32", strides=[bias_stride], align=4)
        codebook = T.match_buffer(codebook_p, (256,), "float32", align=4)
        y = T.match_buffer(y_p, (m, n), "float32", align=4)
        body(x, packed, codes, scale, bias, codebook, y, m, n, k)

    return rows.with_attr("tirx.noalias", True)
