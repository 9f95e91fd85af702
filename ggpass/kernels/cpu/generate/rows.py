# mypy: ignore-errors
"""y[m, n] = scale[n] · Σ_k x[m, k] · w[n, k] + bias[n] for few m: each weight is decoded once, in registers."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from ggpass.kernels.cpu.generate.decoders import Decoder
from ggpass.kernels.cpu.generate.vectors import Registers, horizontal_sum, prefetch, product, shuffle, zeros
from ggpass.kernels.cpu.isa import Isa
from ggpass.kernels.cpu.regimes import LINE


@dataclass(frozen=True)
class RowsShape:
    """How one `rows` kernel is blocked.

    `batch` rows of x share each decoded weight, each with `chains` independent sums, which hide the latency of the
    fused multiply-add. Where the packed rows of x would overflow L1, a task takes `rows` rows of codes and goes
    through them once for every `depth` codes (a multiple of 64), its sums waiting in memory; depth 0 goes through
    a row at once, and through `streams` rows of codes side by side, each in its own part of the matrix: memory is
    read faster in several places. `ahead` is the prefetch distance: bytes along the row for depth 0, else rows.
    """

    batch: int
    chains: int
    ahead: int
    rows: int = 1
    depth: int = 0
    streams: int = 1


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
    """Return the kernel for one instruction set, format and blocking; dynamic in M, N and K >= 64.

    `packed` is a workspace of ceil(M / batch) · batch · ceil(K / 64) · 64 floats.
    """
    batch, chains, lanes, group, depth = shape.batch, shape.chains, isa.lanes, shape.rows, shape.depth
    step, width = isa.code_bytes, shape.batch * shape.chains

    def multiply_line(sums, constants, codes, packed, rows, k, positions):
        """sums += the products of one line of codes of each row with every row of the batch."""
        for s, (row, position) in enumerate(zip(rows, positions)):
            for u in range(LINE // step):
                for v, weight in enumerate(decoder.decode(codes[row, T.ramp(k + u * step, 1, step)], constants)):
                    weight = T.bind(weight) if batch > 1 else weight
                    for m in range(batch):
                        where = position + ((u * 4 + v) * batch + m) * lanes
                        chain = s * width + m * chains + (u * 4 + v) % chains
                        sums.fma(chain, weight, packed[T.ramp(where, 1, lanes)])

    def store(sums, y, scale, bias, row, first, m_total, start=0):
        for m in range(batch):
            total = sums.get(start + m * chains)
            for c in range(1, chains):
                total = T.bind(total + sums.get(start + m * chains + c))
            value = horizontal_sum(total, lanes)
            with T.If(first + m < m_total), T.Then():
                T.buffer_store(y, value * scale[row] + bias[row], [first + m, row])

    def multiply_rows(sums, constants, codes, packed, rows, bases, first_line, last_line, k_total, ahead):
        """Return all lines from first_line to last_line; the last line of a row that is not whole ends with the row."""
        with T.serial(T.min(last_line, k_total // LINE) - first_line) as g:
            k = T.bind((first_line + g) * LINE)
            for row in rows:
                prefetch(ahead(row, k))
            multiply_line(sums, constants, codes, packed, rows, k, [base + k * batch for base in bases])
        with T.If(last_line * LINE > k_total), T.Then():
            last = (last_line - 1) * (LINE * batch)
            multiply_line(sums, constants, codes, packed, rows, k_total - LINE, [base + last for base in bases])

    def at_once(packed, codes, scale, bias, codebook, y, m_total, n_total, k_total, tiles, lines):
        part = T.bind((n_total + (shape.streams - 1)) // shape.streams)
        with T.parallel(part) as first:
            constants = decoder.setup(codebook)
            # Where N does not divide, a last part comes to the last row early and writes the same again.
            rows = [T.bind(T.min(first + s * part, n_total - 1)) for s in range(shape.streams)]
            # Zero, which LLVM cannot know. If it saw that all rows read the same x, it would keep x in registers for
            # the next row, and spill the tables for that.
            hidden = [T.int64(0), *(packed.shape[0] >> (40 + s) for s in range(1, shape.streams))]
            with T.serial(tiles) as tile:
                sums = Registers(isa, shape.streams * width)
                sums.clear()
                bases = [T.bind(tile * lines * (LINE * batch) + zero) for zero in hidden]

                def ahead(row, k):
                    return T.address_of(codes[row, k + shape.ahead])

                multiply_rows(sums, constants, codes, packed, rows, bases, T.int64(0), lines, k_total, ahead)
                for s, row in enumerate(rows):
                    store(sums, y, scale, bias, row, tile * batch, m_total, s * width)

    def in_blocks(packed, codes, scale, bias, codebook, y, m_total, n_total, k_total, tiles, lines):
        block = depth // LINE
        with T.parallel((n_total + (group - 1)) // group) as task:
            constants = decoder.setup(codebook)
            waiting = T.alloc_buffer((group * width * lanes,), "float32")
            first_row = T.bind(task * group)
            count = T.bind(T.min(n_total - first_row, group))
            with T.serial(tiles) as tile:
                base = T.bind(tile * lines * (LINE * batch))
                with T.serial(count * width) as i:
                    T.buffer_store(waiting, zeros(lanes), [T.ramp(i * lanes, 1, lanes)])
                with T.serial((lines + (block - 1)) // block) as b, T.serial(count) as r:
                    row = T.bind(first_row + r)
                    later = T.bind(T.min(row + shape.ahead, n_total - 1))

                    def ahead(_, k):
                        return T.address_of(codes[later, k])

                    sums = Registers(isa, width)
                    for i in range(width):
                        sums.set(i, waiting[T.ramp((r * width + i) * lanes, 1, lanes)])
                    end = T.bind(T.min((b + 1) * block, lines))
                    multiply_rows(sums, constants, codes, packed, [row], [base], b * block, end, k_total, ahead)
                    for i in range(width):
                        T.buffer_store(waiting, sums.get(i), [T.ramp((r * width + i) * lanes, 1, lanes)])
                with T.serial(count) as r:
                    sums = Registers(isa, width)
                    for i in range(width):
                        sums.set(i, waiting[T.ramp((r * width + i) * lanes, 1, lanes)])
                    store(sums, y, scale, bias, first_row + r, tile * batch, m_total)

    def body(x, packed, codes, scale, bias, codebook, y, m_total, n_total, k_total):
        _pack(x, packed, decoder, m_total, batch, k_total)
        tiles = T.bind((m_total + (batch - 1)) // batch)
        lines = T.bind((k_total + (LINE - 1)) // LINE)
        loops = in_blocks if depth else at_once
        loops(packed, codes, scale, bias, codebook, y, m_total, n_total, k_total, tiles, lines)

    return product(body)
