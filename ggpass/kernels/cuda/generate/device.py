# mypy: ignore-errors
"""Device functions that the CUDA kernels call: PTX where a GPU compiles them, plain C++ where a CPU does.

TensorIR has the loops, the indices and the memory; what has no name in it (`prmt`, `mma`, `cp.async`, conversions) is
here, in functions of a few lines. The `#else` bodies compute the same bits, so that the tests run the generated source
on a CPU; there `ggp_warp_*`, `ggp_float` and `ggp_bits` come from the tests' emulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from ggpass.kernels.cuda.geometry import COPIES

_KIND = {"bfloat16": "bf16", "float16": "f16"}

PRELUDE = """\
#ifdef __CUDACC__
#pragma nv_diag_suppress 177
#endif
#define int64_t long long
#define uint unsigned int
#define uchar unsigned char
#define ushort unsigned short
"""

_PRMT = """\
__device__ __forceinline__ uint ggp_prmt(uint low, uint high, uint selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(low, high, selector);
#else
  unsigned long long bytes = ((unsigned long long)high << 32) | low;
  uint out = 0;
  for (int i = 0; i < 4; ++i) out |= (uint)((bytes >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  return out;
#endif
}
"""

# Two products of 16-bit floats, rounded to nearest: a * b + (-0) is a * b, and sm_80 has no mul.bf16x2.
_MULTIPLY = """\
__device__ __forceinline__ uint ggp_multiply_{kind}(uint a, uint b) {{
#ifdef __CUDA_ARCH__
  uint out;
  asm("fma.rn.{kind}x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(0x80008000u));
  return out;
#else
  uint low = ggp_bits_{kind}(ggp_float_{kind}(a & 0xffff) * ggp_float_{kind}(b & 0xffff));
  return low | ggp_bits_{kind}(ggp_float_{kind}(a >> 16) * ggp_float_{kind}(b >> 16)) << 16;
#endif
}}
"""

# A constant that the assembler does not know to be one: prmt takes one immediate, and a known constant in the other
# operand is moved into a register anew for every use, a tenth of all instructions. Blocks have one row of threads.
_OPAQUE = """\
__device__ __forceinline__ uint ggp_opaque(uint value) { return value + threadIdx.y; }
"""

#: Of the residuals' table, the half that stays in a register: the low bytes of Q, or its high ones.
RF8_TABLE = {"bf16": 0x80706040, "f16": 0x3C3B3B3A}

# P * Q with P = +-2^(e - 127), zero for e = 0, and Q = (1 + r) * 2^112 = 0x7780 + T[r]: the low bytes of Q are looked
# up, two codes at a time. The selector's other two nibbles are 0, so that its high bytes hold T[0]'s 0x40.
_DECODE_RF8_BF16 = """\
__device__ __forceinline__ void ggp_decode_rf8_bf16(uint* out, uint codes, uint table) {
  uint residuals = codes & 0x07070707u;
  for (int i = 0; i < 2; ++i) {
    uint twice = ggp_prmt(codes, 0u, i ? 0x3322u : 0x1100u);
    uint factor = ggp_prmt(table, 0xc0a09088u, i ? residuals >> 16 : residuals) ^ 0x37003700u;
    factor |= twice & 0x80008000u;
    out[i] = ggp_multiply_bf16((twice << 4) & 0x07800780u, factor);
  }
}
"""

# The same in float16: P = +-2^(e - 15), Q = 1 + r = 0x3c00 + 8 T[r], whose two bytes are looked up apart.
_DECODE_RF8_F16 = """\
__device__ __forceinline__ void ggp_decode_rf8_f16(uint* out, uint codes, uint table) {
  uint residuals = codes & 0x07070707u;
  for (int i = 0; i < 2; ++i) {
    uint twice = ggp_prmt(codes, 0u, i ? 0x3322u : 0x1100u);
    uint selector = i ? residuals >> 16 : residuals;
    uint high = ggp_prmt(table, 0x3e3d3c3cu, selector) << 8;
    uint low = ggp_prmt(0x00800000u, 0x00008040u, selector);
    uint factor = (high & 0xff00ff00u) | (low & 0x00ff00ffu) | (twice & 0x80008000u);
    out[i] = ggp_multiply_f16((twice << 7) & 0x3c003c00u, factor);
  }
}
"""

# One 32-bit word a value in shared memory; lanes that differ mod `copies` never meet in a bank.
_DECODE_TABLE = """\
__device__ __forceinline__ void ggp_decode_table(uint* out, uint codes, const uint* table) {{
  for (int i = 0; i < 2; ++i) {{
    uint low = table[((codes >> (16 * i)) & 0xff) * {copies}];
    out[i] = low | table[((codes >> (16 * i + 8)) & 0xff) * {copies}] << 16;
  }}
}}
"""

# sums += A * B: 16 rows of activations, 8 rows of weights, 16 positions of k; products exact, sums float32.
_MMA = """\
__device__ __forceinline__ void ggp_mma_{kind}(float* sums, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {{
#ifdef __CUDA_ARCH__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, "
      "{{%0, %1, %2, %3}};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  uint a[4] = {{a0, a1, a2, a3}}, b[2] = {{b0, b1}};
  ggp_warp_mma(sums, a, b, ggp_float_{kind});
#endif
}}
"""

# 16 bytes of global memory into shared memory while the thread goes on; without `whole`, zeros. Read past L1, as
# nothing of it is read twice by this multiprocessor soon.
_COPY = """\
__device__ __forceinline__ void ggp_copy(void* to, const void* from, int whole) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
               :: "r"((uint)__cvta_generic_to_shared(to)), "l"(from), "r"(whole > 0 ? 16 : 0) : "memory");
#else
  ggp_later_copy(to, from, whole > 0 ? 16 : 0);
#endif
}
"""

# The same for rows that begin anywhere and end within 16 bytes: the first `count` bytes, the rest zero.
_COPY_BYTES = """\
__device__ __forceinline__ void ggp_copy(void* to, const void* from, int count) {
#pragma unroll 1
  for (int i = 0; i < 16; i += 4) {
    uint word = 0u;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (i + j < count) word |= (uint)((const uchar*)from)[i + j] << (8 * j);
    ((uint*)to)[i / 4] = word;
  }
}
"""

# Offsets of 32 bits within a block, from an address of 64 that the block shares.
_AT = """\
__device__ __forceinline__ const void* ggp_at_{size}(const void* base, int index) {{
  return (const uchar*)base + (int64_t)index * {size};
}}
"""

# The value, as if it were new: what is computed from it in a loop is computed there, instead of in front of the loop
# and kept in registers that the sums need.
_FRESH = """\
__device__ __forceinline__ int ggp_fresh(int value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
  return value;
}
"""

_STORE = """\
__device__ __forceinline__ void ggp_store(void* to, const void* from) {
  struct alignas(16) Unit { uint words[4]; };
  *(Unit*)to = *(const Unit*)from;
}
"""

# `count` codes at a multiple of `count` bytes, read once; without `known`, zeros.
_LOAD = """\
__device__ __forceinline__ void ggp_load_{count}(uint* out, const void* from, int known) {{
  struct alignas({count}) Codes {{ {type} words[{words}]; }};
  Codes codes;
  for (int i = 0; i < {words}; ++i) codes.words[i] = 0;
  if (known) codes = *(const Codes*)from;
  for (int i = 0; i < {words}; ++i) out[i] = codes.words[i];
}}
"""

_COMMIT = """\
__device__ __forceinline__ void ggp_commit() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ggp_later_commit();
#endif
}
"""

# Until at most `count` of this thread's groups of copies are under way.
_WAIT = """\
__device__ __forceinline__ void ggp_wait_{count}() {{
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group {count};" ::: "memory");
#else
  ggp_later_wait({count});
#endif
}}
"""

_ROUND = """\
__device__ __forceinline__ ushort ggp_round_{kind}(float value) {{
#ifdef __CUDA_ARCH__
  ushort out;
  asm("cvt.rn.{kind}.f32 %0, %1;" : "=h"(out) : "f"(value));
  return out;
#else
  return (ushort)ggp_bits_{kind}(value);
#endif
}}
"""


@dataclass(frozen=True)
class Device:
    """The device functions for one dtype of activations, called from TensorIR.

    Attributes:
        aligned: whether rows of codes and of activations begin at 16 bytes, that is K % 16 = 0.
    """

    dtype: str
    aligned: bool = True

    @property
    def kind(self) -> str:
        """Return the dtype as PTX calls it."""
        return _KIND[self.dtype]

    def rf8_table(self):
        """Return the first half of the residuals' table, to be kept in a register."""
        value = T.uint32(RF8_TABLE[self.kind])
        return T.cuda.func_call("ggp_opaque", value, source_code=_OPAQUE, return_type="uint32")

    def decode_rf8(self, out, codes, table):
        """out[0:2] = the four weights of a word of codes, two 16-bit floats a word."""
        text = _DECODE_RF8_BF16 if self.kind == "bf16" else _DECODE_RF8_F16
        source = _PRMT + _MULTIPLY.format(kind=self.kind) + text
        return T.cuda.func_call(f"ggp_decode_rf8_{self.kind}", out, codes, table, source_code=source)

    def decode_table(self, out, codes, table):
        """Return the same by a lookup; `table` points at this lane's copy."""
        source = _DECODE_TABLE.format(copies=COPIES)
        return T.cuda.func_call("ggp_decode_table", out, codes, table, source_code=source)

    def mma(self, sums, a, b):
        """sums[0:4] += the product of four words of activations and two of weights."""
        return T.cuda.func_call(f"ggp_mma_{self.kind}", sums, *a, *b, source_code=_MMA.format(kind=self.kind))

    def copy(self, to, address, count):
        """Begin to copy 16 bytes to shared memory; those beyond `count` become zero."""
        return T.cuda.func_call("ggp_copy", to, address, count, source_code=_COPY if self.aligned else _COPY_BYTES)

    def at(self, base, index, size: int):
        """Return the address of element `index`, of `size` bytes, from `base`."""
        return T.cuda.func_call(f"ggp_at_{size}", base, index, source_code=_AT.format(size=size), return_type="handle")

    def fresh(self, value):
        """Return the value, of which the compiler knows nothing."""
        return T.cuda.func_call("ggp_fresh", value, source_code=_FRESH, return_type="int32")

    def load(self, out, address, count: int, known):
        """`count` codes, 1, 4 or 8, as words; zeros where `known` is 0."""
        kind = {"type": "uchar" if count < 4 else "uint", "words": max(1, count // 4)}
        return T.cuda.func_call(f"ggp_load_{count}", out, address, known, source_code=_LOAD.format(count=count, **kind))

    def store(self, to, address):
        """Move 16 bytes between aligned places."""
        return T.cuda.func_call("ggp_store", to, address, source_code=_STORE)

    def commit(self):
        """Return all copies since the last call are a group."""
        return T.cuda.func_call("ggp_commit", source_code=_COMMIT)

    def wait(self, count: int):
        """Wait until at most `count` groups of this thread are under way."""
        return T.cuda.func_call(f"ggp_wait_{count}", source_code=_WAIT.format(count=count))

    def round(self, value):
        """Return the bits of a float32 value rounded to the activations' dtype."""
        source = _ROUND.format(kind=self.kind)
        return T.cuda.func_call(f"ggp_round_{self.kind}", value, source_code=source, return_type="uint16")


@dataclass(frozen=True)
class Decoder:
    """How a kernel decodes: RF8 by bits, anything else by tables in its shared memory at word `offset`.

    `table` is what every decoding needs: the word of `rf8_table`, or the address of a lane's copy of the codebook.
    """

    device: Device
    name: str
    table: object

    def decode(self, weights, at: int, word) -> None:
        """weights[at : at + 2] = the four weights of a word of codes."""
        function = self.device.decode_rf8 if self.name == "rf8" else self.device.decode_table
        T.evaluate(function(T.address_of(weights[at]), word, self.table))


def decoder(device: Device, name: str, shared, offset: int, codebook, thread, threads: int) -> Decoder:
    """The decoder, after all threads have filled shared[offset + code · copies + copy] = codebook[code] where needed.

    Values are rounded to the activations' dtype.
    """
    if name == "rf8":
        return Decoder(device, name, T.bind(device.rf8_table()))
    with T.serial(256 * COPIES // threads) as i:
        value = device.round(codebook[(i * threads + thread) // COPIES])
        T.buffer_store(shared, T.cast(value, "uint32"), [offset + i * threads + thread])
    T.evaluate(T.tvm_storage_sync("shared"))
    return Decoder(device, name, T.address_of(shared[offset + thread % COPIES]))
