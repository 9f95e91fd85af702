# mypy: ignore-errors
"""y[m, n] = scale[n] · Σ_k x[m, k] · w[n, k] + bias[n] for middle m: a register-tiled product on decoded blocks."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from ggpass.kernels.cpu.generate.decoders import Decoder
from ggpass.kernels.cpu.generate.vectors import Registers, prefetch, product, transpose, zeros
from ggpass.kernels.cpu.isa import Isa
from ggpass.kernels.cpu.regimes import LINE


@dataclass(frozen=True)
class TileShape:
    """How one `tile` kernel is blocked.

    A register tile is `vectors` vectors of x rows by `columns` rows of codes. A task decodes `tiles` times
    `columns` rows of codes, `depth` codes deep (a multiple of 64), into L1 and multiplies them with every panel.
    """

    vectors: int
    columns: int
    tiles: int
    depth: int

    @property
    def rows(self) -> int:
        """Rows of codes decoded at a time."""
        return self.columns * self.tiles

    def panel(self, isa: Isa) -> int:
        """Rows of x in one panel."""
        return self.vectors * isa.lanes


def tile_kernel(isa: Isa, decoder: Decoder, shape: TileShape):
    """Return the kernel for one instruction set, format and blocking; dynamic in M, N and K >= 64.

    `packed` is a workspace of ceil(M / panel) · ceil(K / 64) · 64 · panel floats.
    """
    lanes, panel, depth, rows = isa.lanes, shape.panel(isa), shape.depth, shape.rows
    step, order = isa.code_bytes, decoder.order
    position = sorted(range(step), key=order.__getitem__)  # of each k among the lanes of a step

    def pack_whole(x, packed, task, first_row, start):
        """Return a line of a full panel, by squares that are transposed in registers."""
        with T.serial(shape.vectors) as v, T.serial(LINE // step) as u:
            row = T.bind(first_row + v * lanes)
            for first in range(0, step, lanes):
                where = T.ramp(start + u * step + first, 1, lanes)
                square = [T.bind(x[row + i, where]) for i in range(lanes)]
                for i, column in enumerate(transpose(square, lanes)):
                    to = (task * LINE + u * step + position[first + i]) * panel + v * lanes
                    T.buffer_store(packed, column, [T.ramp(to, 1, lanes)])

    def pack_edge(x, packed, task, first_row, start, skip, m_total):
        """A line of a panel that lacks rows, or one of which the first `skip` codes have already been counted."""
        with T.serial(panel) as j:
            row = T.bind(T.min(first_row + j, m_total - 1))
            with T.serial(LINE // step) as u:
                for lane, k in enumerate(order):
                    value = T.if_then_else(u * step + k >= skip, x[row, start + u * step + k], T.float32(0))
                    T.buffer_store(packed, value, [(task * LINE + u * step + lane) * panel + j])

    def pack(x, packed, m_total, k_total):
        """packed[panel, k in decode order, m]: a panel holds the same k of all its rows side by side."""
        lines = T.bind((k_total + (LINE - 1)) // LINE)
        with T.parallel((m_total + (panel - 1)) // panel * lines) as task:
            first_row, line = T.bind(task // lines * panel), T.bind(task % lines)
            start = T.bind(T.min(line * LINE, k_total - LINE))
            # The last line overlaps the one before: what that one has already counted is zero here.
            skip = T.bind(line * LINE - start)
            with T.If(T.And(skip == 0, first_row + panel <= m_total)):
                with T.Then():
                    pack_whole(x, packed, task, first_row, start)
                with T.Else():
                    pack_edge(x, packed, task, first_row, start, skip, m_total)

    def decode(codes, constants, block, first, n_total, k_total, k0, length):
        with T.serial(rows) as r:
            row = T.bind(T.min(first + r, n_total - 1))
            ahead = T.bind(T.min(first + r + rows, n_total - 1))
            with T.serial(length // LINE) as g:
                k = T.bind(T.min(k0 + g * LINE, k_total - LINE))
                prefetch(T.address_of(codes[ahead, k]))
                for u in range(LINE // step):
                    for v, weight in enumerate(decoder.decode(codes[row, T.ramp(k + u * step, 1, step)], constants)):
                        where = r * depth + g * LINE + u * step + v * lanes
                        T.buffer_store(block, weight, [T.ramp(where, 1, lanes)])

    def multiply(sums, packed, block, partial, x_base, r0, p, length):
        """partial[p, r, m] += Σ_k packed[k, m] · block[r, k] over one block of k, all sums in registers."""
        tile = [(r, v) for r in range(shape.columns) for v in range(shape.vectors)]
        for i, (r, v) in enumerate(tile):
            where = (p * rows + r0 + r) * panel + v * lanes
            sums.set(i, partial[T.ramp(where, 1, lanes)])
        with T.serial(length) as k:
            values = [T.bind(packed[T.ramp(x_base + k * panel + v * lanes, 1, lanes)]) for v in range(shape.vectors)]
            for r in range(shape.columns):
                weight = T.bind(T.Broadcast(block[(r0 + r) * depth + k], lanes))
                for v in range(shape.vectors):
                    sums.fma(r * shape.vectors + v, values[v], weight)
        for i, (r, v) in enumerate(tile):
            where = (p * rows + r0 + r) * panel + v * lanes
            T.buffer_store(partial, sums.get(i), [T.ramp(where, 1, lanes)])

    def finish(partial, scale, bias, first, n_total, panels):
        """partial = partial · scale + bias, while a vector still belongs to one row of codes."""
        with T.serial(panels) as p, T.serial(rows) as r:
            row = T.bind(T.min(first + r, n_total - 1))
            for v in range(shape.vectors):
                where = T.ramp((p * rows + r) * panel + v * lanes, 1, lanes)
                scaled = partial[where] * T.Broadcast(scale[row], lanes)
                T.buffer_store(partial, scaled + T.Broadcast(bias[row], lanes), [where])

    def write(partial, y, first, m_total, columns):
        """y[m, first + r] for all m and the given r."""
        with T.serial(m_total) as m:
            for r in columns:
                T.buffer_store(y, partial[(m // panel * rows + r) * panel + m % panel], [m, first + r])

    def body(x, packed, codes, scale, bias, codebook, y, m_total, n_total, k_total):
        pack(x, packed, m_total, k_total)
        panels = T.bind((m_total + (panel - 1)) // panel)
        padded = T.bind((k_total + (LINE - 1)) // LINE * LINE)
        with T.parallel((n_total + (rows - 1)) // rows) as task:
            constants = decoder.setup(codebook)
            first = T.bind(task * rows)
            block = T.alloc_buffer((rows * depth,), "float32")
            partial = T.alloc_buffer((panels * (rows * panel),), "float32")
            with T.serial(panels * (rows * shape.vectors)) as i:
                T.buffer_store(partial, zeros(lanes), [T.ramp(i * lanes, 1, lanes)])
            with T.serial((padded + (depth - 1)) // depth) as b:
                length = T.bind(T.min(padded - b * depth, depth))
                decode(codes, constants, block, first, n_total, k_total, b * depth, length)
                with T.serial(panels) as p:
                    sums = Registers(isa, shape.columns * shape.vectors)
                    with T.serial(shape.tiles) as t:
                        x_base = T.bind((p * padded + b * depth) * panel)
                        multiply(sums, packed, block, partial, x_base, t * shape.columns, p, length)
            finish(partial, scale, bias, first, n_total, panels)
            with T.If(n_total - first >= rows):
                with T.Then():
                    write(partial, y, first, m_total, range(rows))
                with T.Else(), T.serial(n_total - first) as r:
                    write(partial, y, first, m_total, [r])

    return product(body)
