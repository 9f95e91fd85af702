# mypy: ignore-errors
"""What the CUDA kernels compute, in plain loops: the same functions unscheduled, for a CPU to run and a reader to read.

Each value is formed as in the kernels: weights in the activations' dtype, products and sums in float32, one rounding at
the end. Only the order of a sum is theirs alone.
"""

from __future__ import annotations

from tvm.script import tirx as T

#: T[r]: what residual 0 to 7 adds to the bits of 2^e in bfloat16.
_RESIDUALS = (-0x40, -0x20, -0x10, 0, 0x08, 0x10, 0x20, 0x40)


def decode_rf8(code):
    """w = (-1)^s · 2^(e - 15) · (1 + r) of the code s eeee rrr, float32; zero for e = 0.

    Its bits in bfloat16 are s << 15 | ((e + 112) << 7) + T[r].
    """
    code = T.cast(code, "int32")
    exponent, residual = (code >> 3) & 15, code & 7
    added = T.int32(_RESIDUALS[0])
    for index in range(1, 8):
        added = T.Select(residual == index, T.int32(_RESIDUALS[index]), added)
    bits = ((code & 128) << 8) | (((exponent + 112) << 7) + added)
    value = T.reinterpret("float32", T.cast(bits, "uint32") << T.uint32(16))
    return T.Select(exponent == 0, T.float32(0), value)


def decode(decoder: str, dtype: str, codebook, code):
    """The weight of a code as the kernels multiply it: rounded to `dtype`, given as float32."""
    value = decode_rf8(code) if decoder == "rf8" else codebook[T.cast(code, "int32")]
    return rounded(value, dtype)


def rounded(value, dtype: str):
    """The nearest value of `dtype`, ties to even, as float32: casts to bfloat16 and back are optimized away."""
    if dtype != "bfloat16":
        return T.cast(T.cast(value, dtype), "float32")
    bits = T.reinterpret("uint32", value)
    up = T.uint32(0x7FFF) + ((bits >> T.uint32(16)) & T.uint32(1))
    return T.reinterpret("float32", (bits + up) & T.uint32(0xFFFF0000))


def linear(decoder: str, dtype: str):
    """y[m, n] = round(scale[n] · Σ_k x[m, k] · w[n, k] + bias[n])."""

    @T.prim_func(s_tir=True)
    def linear(
        x_p: T.handle, codes_p: T.handle, scale_p: T.handle, codebook_p: T.handle, bias_p: T.handle, y_p: T.handle
    ):
        m = T.int64()
        n = T.int64()
        k = T.int64()
        x = T.match_buffer(x_p, (m, k), dtype)
        codes = T.match_buffer(codes_p, (n, k), "uint8")
        scale = T.match_buffer(scale_p, (n,), "float32")
        codebook = T.match_buffer(codebook_p, (256,), "float32")
        bias = T.match_buffer(bias_p, (n,), "float32")
        y = T.match_buffer(y_p, (m, n), dtype)
        for i, j in T.grid(m, n):
            total = T.alloc_buffer((1,), "float32")
            total[0] = T.float32(0)
            for q in T.serial(k):
                total[0] = total[0] + T.cast(x[i, q], "float32") * decode(decoder, dtype, codebook, codes[j, q])
            y[i, j] = T.cast(total[0] * scale[j] + bias[j], dtype)

    return linear


def dequantize(decoder: str, dtype: str):
    """y[n, k] = round(w[n, k] · scale[n])."""

    @T.prim_func(s_tir=True)
    def dequantize(codes_p: T.handle, scale_p: T.handle, codebook_p: T.handle, y_p: T.handle):
        n = T.int64()
        k = T.int64()
        codes = T.match_buffer(codes_p, (n, k), "uint8")
        scale = T.match_buffer(scale_p, (n,), "float32")
        codebook = T.match_buffer(codebook_p, (256,), "float32")
        y = T.match_buffer(y_p, (n, k), dtype)
        for i, j in T.grid(n, k):
            y[i, j] = T.cast(decode(decoder, "float32", codebook, codes[i, j]) * scale[i], dtype)

    return dequantize


def embedding(decoder: str, dtype: str):
    """y[i, k] = round(w[ids[i], k] · scale[ids[i]]), NaN for an id outside [0, N)."""

    @T.prim_func(s_tir=True)
    def embedding(ids_p: T.handle, codes_p: T.handle, scale_p: T.handle, codebook_p: T.handle, y_p: T.handle):
        m = T.int64()
        n = T.int64()
        k = T.int64()
        ids = T.match_buffer(ids_p, (m,), "int64")
        codes = T.match_buffer(codes_p, (n, k), "uint8")
        scale = T.match_buffer(scale_p, (n,), "float32")
        codebook = T.match_buffer(codebook_p, (256,), "float32")
        y = T.match_buffer(y_p, (m, k), dtype)
        for i, j in T.grid(m, k):
            if ids[i] >= T.int64(0) and ids[i] < n:
                y[i, j] = T.cast(decode(decoder, "float32", codebook, codes[ids[i], j]) * scale[ids[i]], dtype)
            else:
                y[i, j] = T.cast(T.reinterpret("float32", T.uint32(0x7FC00000)), dtype)

    return embedding
