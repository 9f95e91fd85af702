# mypy: ignore-errors
"""How a vector of codes becomes four vectors of float32 weights.

A decoder takes `code_bytes` consecutive codes and gives four float vectors whose lanes are these codes in the
decoder's own `order`; kernels permute the activations to match, so that codes keep their natural order in memory.
"""

from __future__ import annotations

import numpy as np
from tvm.script import tirx as T

from ggpass.kernels.cpu.generate.vectors import opaque, shuffle, splat
from ggpass.kernels.cpu.isa import AVX2, AVX2_ZEN, AVX512, NEON, Isa

#: T[r] of the RF8 layout: what residual r adds to the bf16 pattern of 2^e.
_RESIDUAL = np.array([-0x40, -0x20, -0x10, 0, 0x08, 0x10, 0x20, 0x40])
_BIAS = 112  # bf16 exponent of 2^(e - 15), less e


#: The instruction that looks up 16 bytes at a time, within each 128-bit block.
_LOOKUP = {
    AVX2.name: "llvm.x86.avx2.pshuf.b",
    AVX2_ZEN.name: "llvm.x86.avx2.pshuf.b",
    AVX512.name: "llvm.x86.avx512.pshuf.b.512",
    NEON.name: "llvm.aarch64.neon.tbl1",
}


class Decoder:
    """Natural order; subclasses give `decode` and, where they need them, constants held in registers."""

    name: str

    def __init__(self, isa: Isa) -> None:
        self.isa = isa

    @property
    def order(self) -> list[int]:
        """order[v * lanes + j] is the position, among the codes of a step, of lane j of vector v."""
        return list(range(self.isa.code_bytes))

    def setup(self, codebook):
        """Emit what is constant over all codes; the result is handed to every `decode`."""
        return codebook

    def decode(self, codes, constants) -> list:
        """Four float32 vectors from one uint8 vector."""
        raise NotImplementedError

    def part(self, codes, v: int):
        """Return the codes of float vector v, still as bytes."""
        lanes = self.isa.lanes
        return shuffle([codes], range(v * lanes, (v + 1) * lanes))


class Rf8Shuffle(Decoder):
    """bf16 = (high[c >> 4] - borrow[c & 15]) << 8 | low[c & 15], thirteen vector operations for a step.

    The low nibble holds the last exponent bit and the residual, and settles the low byte of the bf16 pattern; a
    negative residual borrows one from the high byte. Codes are canonical, so a low nibble of 0 occurs in 0x00
    only, and its "borrow" takes the whole high byte away: zero is exact. Bytes interleave to bf16, and the even
    and odd halves of each 32-bit lane become float32 by a shift and by a mask.
    """

    name = "rf8"

    @property
    def order(self) -> list[int]:
        lanes, blocks = self.isa.lanes, self.isa.code_bytes // 16
        pairs = [(half, odd) for half in range(2) for odd in range(2)]
        order = [
            16 * block + 8 * half + 2 * j + odd for half, odd in pairs for block in range(blocks) for j in range(4)
        ]
        assert len(order) == 4 * lanes
        return order

    @staticmethod
    def tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """low, borrow and high: three tables of 16 bytes."""
        nibble = np.arange(16)
        pattern = ((nibble >> 3) << 7) + _RESIDUAL[nibble & 7]
        low, borrow = pattern & 0xFF, (pattern < 0).astype(int)
        high = ((nibble >> 3) << 7) + (_BIAS >> 1) + (nibble & 7)
        low[0], borrow[0] = 0, high[0]
        return low.astype(np.uint8), borrow.astype(np.uint8), high.astype(np.uint8)

    def _bytes(self, values):
        """Return a constant byte vector that repeats the 16 `values`."""
        n = self.isa.code_bytes
        scalars = [T.int8(int(v)) for v in np.asarray(values, np.uint8).view(np.int8)]
        return shuffle(scalars * (n // 16), range(n))

    def _lookup(self, table, index):
        dtype = f"int8x{self.isa.code_bytes}"
        return T.call_llvm_pure_intrin(dtype, _LOOKUP[self.isa.name], table, index)

    def setup(self, codebook):
        n, lanes = self.isa.code_bytes, self.isa.lanes
        tables = [T.bind(opaque(self._bytes(t), f"int8x{n}", lanes)) for t in self.tables()]
        odd = T.bind(opaque(splat(0xFFFF0000, "uint32", lanes), f"uint32x{lanes}", lanes))
        even = T.bind(opaque(splat(1 << 16, "uint32", lanes), f"uint32x{lanes}", lanes))
        return *tables, odd, even

    def _high_nibbles(self, codes):
        n = self.isa.code_bytes
        if self.isa.shift_by_multiply:
            words = T.reinterpret(f"int16x{n // 2}", codes)
            sixteenth = splat(1 << 12, "int16", n // 2)
            shifted = T.call_llvm_pure_intrin(f"int16x{n // 2}", "llvm.x86.avx2.pmulhu.w", words, sixteenth)
        else:
            shifted = T.reinterpret(f"uint16x{n // 2}", codes) >> splat(4, "uint16", n // 2)
        return T.bind(T.reinterpret(f"int8x{n}", shifted) & self._bytes([15] * 16))

    def decode(self, codes, constants) -> list:
        low, borrow, high, odd, even = constants
        n, lanes = self.isa.code_bytes, self.isa.lanes
        codes = T.bind(T.reinterpret(f"int8x{n}", codes))
        lo = T.bind(codes & self._bytes([15] * 16))
        low_byte = T.bind(self._lookup(low, lo))
        high_byte = self._lookup(high, self._high_nibbles(codes)) - self._lookup(borrow, lo)
        high_byte = T.bind(opaque(high_byte, f"int8x{n}", lanes))
        out = []
        for half in range(2):
            index = [16 * b + 8 * half + j + n * byte for b in range(n // 16) for j in range(8) for byte in range(2)]
            pairs = T.bind(T.reinterpret(f"uint32x{lanes}", shuffle([low_byte, high_byte], index)))
            shifted = pairs * even if self.isa.shift_by_multiply else pairs << splat(16, "uint32", lanes)
            out.append(T.reinterpret(f"float32x{lanes}", shifted))
            out.append(T.reinterpret(f"float32x{lanes}", pairs & odd))
        return out


class Rf8Bits(Decoder):
    """float32 bits = s << 31 | ((e, rrr) << 20) + (111 << 23 | 3 << 22) + d[rrr] << 19, zero for code 0.

    Plain vector arithmetic for a CPU without a byte shuffle. `T[r] - 16 r + 64` is 0, 16, 16, 16, 8, 0, 0, 16, so
    two bits a residual, packed into one constant, hold what the linear mantissa misses.
    """

    name = "rf8"

    _CORRECTION = sum(((int(t) - 16 * r + 64) // 8) << (2 * r) for r, t in enumerate(_RESIDUAL))

    def decode(self, codes, constants) -> list:
        return [self._part(self.part(codes, v)) for v in range(4)]

    def _part(self, codes):
        lanes, dtype = self.isa.lanes, f"uint32x{self.isa.lanes}"

        def const(value: int):
            return splat(value, "uint32", lanes)

        c = T.bind(T.cast(codes, dtype))
        magnitude = (c & const(0x7F)) << const(20)
        correction = (const(self._CORRECTION) >> ((c & const(7)) << const(1))) & const(3)
        offset = (_BIAS << 23) - (64 << 16)
        bits = T.bind(magnitude + const(offset) + (correction << const(19)) | ((c & const(0x80)) << const(24)))
        return T.reinterpret(f"float32x{lanes}", T.Select(c == const(0), const(0), bits))


class Linear(Decoder):
    """w = int8(code), for codebooks that are a multiple of the signed code; the multiple goes into the scale."""

    name = "linear"

    def decode(self, codes, constants) -> list:
        lanes = self.isa.lanes
        signed = T.bind(T.reinterpret(f"int8x{self.isa.code_bytes}", codes))
        return [T.cast(self.part(signed, v), f"float32x{lanes}") for v in range(4)]


class Table(Decoder):
    """w = codebook[code]: one load for each weight, for every other format."""

    name = "table"

    def decode(self, codes, constants) -> list:
        lanes, dtype = self.isa.lanes, f"int32x{self.isa.lanes}"
        return [T.bind(constants[T.cast(self.part(codes, v), dtype)]) for v in range(4)]


def decoders(isa: Isa) -> list[Decoder]:
    """Return one decoder of each kind for `isa`, RF8 first."""
    rf8 = Rf8Shuffle(isa) if isa.decode == "shuffle" else Rf8Bits(isa)
    return [rf8, Linear(isa), Table(isa)]
