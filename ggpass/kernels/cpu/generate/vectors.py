# mypy: ignore-errors
"""Small vector helpers in TensorIR, and the signature of a product, shared by the kernel generators.

They are plain Python called from inside a TVMScript body: each emits into the function being built.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx
from tvm.script import tirx as T

from ggpass.kernels.cpu.isa import Isa


def splat(value, dtype: str, lanes: int):
    """`lanes` copies of a constant."""
    return T.Broadcast(tirx.const(value, dtype), lanes)


def shuffle(sources: Sequence, indices: Sequence[int]):
    """Return the elements `indices` of the concatenated `sources`, as LLVM's shufflevector."""
    return tirx.Shuffle(list(sources), [tirx.const(int(i), "int32") for i in indices])


def zeros(lanes: int):
    """Return a float32 vector of zeros."""
    return splat(0.0, "float32", lanes)


def opaque(value, dtype: str, lanes: int):
    """`value`, which LLVM may neither fold nor recompute from here on; costs no instruction.

    Without it LLVM sees through the byte shuffles, finds that each half of an unpack needs half of the lanes,
    and decodes every code twice; it also reloads the tables from memory inside the loop.
    """
    floats = T.reinterpret(f"float32x{lanes}", value)
    return T.reinterpret(dtype, T.call_llvm_pure_intrin(f"float32x{lanes}", "llvm.arithmetic.fence", floats))


def prefetch(address):
    """Ask for one cache line that will be read, into every cache level; never faults."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", address, 0, 3, 1))


def horizontal_sum(vector, lanes: int):
    """sum_j vector[j], halving the vector each time."""
    while lanes > 1:
        lanes //= 2
        low = shuffle([vector], range(lanes))
        vector = T.bind(low + shuffle([vector], range(lanes, 2 * lanes)))
    return vector


def transpose(rows: Sequence, lanes: int) -> list:
    """Return the columns of a square of `lanes` vectors; log2(lanes) rounds of pairwise interleaving."""
    half = 1
    while half < lanes:
        # Exchange the off-diagonal blocks of size `half` between rows whose numbers differ in that bit.
        low = [j if not j & half else j - half + lanes for j in range(lanes)]
        high = [j + half if not j & half else j + lanes for j in range(lanes)]
        swapped = list(rows)
        for i in range(lanes):
            if not i & half:
                swapped[i] = T.bind(shuffle([rows[i], rows[i + half]], low))
                swapped[i + half] = T.bind(shuffle([rows[i], rows[i + half]], high))
        rows, half = swapped, 2 * half
    return list(rows)


class Registers:
    """A small array of float vectors that LLVM keeps in registers.

    A buffer of scope "global" below 1 KiB lies on the stack, from where LLVM promotes it; scope "local" would
    make TVM call the workspace allocator for every row.
    """

    def __init__(self, isa: Isa, count: int) -> None:
        self.lanes = isa.lanes
        self.count = count
        self.buffer = T.alloc_buffer((count * isa.lanes,), "float32")

    def at(self, i: int):
        return T.ramp(i * self.lanes, 1, self.lanes)

    def get(self, i: int):
        return self.buffer[self.at(i)]

    def set(self, i: int, value) -> None:
        T.buffer_store(self.buffer, value, [self.at(i)])

    def clear(self) -> None:
        for i in range(self.count):
            self.set(i, zeros(self.lanes))

    def fma(self, i: int, a, b) -> None:
        """registers[i] += a * b, rounded once."""
        self.set(i, T.fma(a, b, self.get(i)))


def product(body):
    """The function y = x · wᵀ · scale + bias, its arguments matched to buffers of any strides, around `body`."""

    @T.prim_func(s_tir=True)
    def kernel(
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

    return kernel.with_attr("tirx.noalias", True)
