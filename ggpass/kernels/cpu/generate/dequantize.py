# mypy: ignore-errors
"""out[i, k] = codebook[codes[row(i), k]] · scale[row(i)], with row(i) = i, or ids[i] for an embedding."""

from __future__ import annotations

from tvm.script import tirx as T

from ggpass.kernels.cpu.generate.decoders import Decoder
from ggpass.kernels.cpu.generate.vectors import prefetch, shuffle
from ggpass.kernels.cpu.isa import Isa
from ggpass.kernels.cpu.regimes import LINE

_AHEAD = 1024


def _decode_row(isa: Isa, decoder: Decoder, constants, codes, row, factor, out, i, k_total):
    order = decoder.order
    natural = sorted(range(len(order)), key=order.__getitem__)

    def line(k):
        prefetch(T.address_of(codes[row, k + _AHEAD]))
        for u in range(LINE // isa.code_bytes):
            where = T.ramp(k + u * isa.code_bytes, 1, isa.code_bytes)
            scaled = [T.bind(w * T.Broadcast(factor, isa.lanes)) for w in decoder.decode(codes[row, where], constants)]
            T.buffer_store(out, shuffle(scaled, natural), [i, where])

    with T.serial(k_total // LINE) as g:
        line(g * LINE)
    # The last line overlaps the one before and writes the same values again.
    with T.If(k_total % LINE != 0), T.Then():
        line(k_total - LINE)


def dequantize_kernel(isa: Isa, decoder: Decoder):
    """Return all rows of `codes`, to float32; dynamic in N and K >= 64."""

    @T.prim_func(s_tir=True)
    def dequantize(codes_p: T.handle, scale_p: T.handle, codebook_p: T.handle, out_p: T.handle):
        n = T.int64()
        k = T.int64()
        code_stride = T.int64()
        scale_stride = T.int64()
        out_stride = T.int64()
        codes = T.match_buffer(codes_p, (n, k), "uint8", strides=[code_stride, T.int64(1)], align=1)
        scale = T.match_buffer(scale_p, (n,), "float32", strides=[scale_stride], align=4)
        codebook = T.match_buffer(codebook_p, (256,), "float32", align=4)
        out = T.match_buffer(out_p, (n, k), "float32", strides=[out_stride, T.int64(1)], align=4)
        for i in T.parallel(n):
            constants = T.meta_var(decoder.setup(codebook))
            _decode_row(isa, decoder, constants, codes, i, scale[i], out, i, k)

    return dequantize.with_attr("tirx.noalias", True)


def embedding_kernel(isa: Isa, decoder: Decoder):
    """Return the rows `ids` of `codes`, to float32; the caller has checked the range of the ids."""

    @T.prim_func(s_tir=True)
    def embedding(ids_p: T.handle, codes_p: T.handle, scale_p: T.handle, codebook_p: T.handle, out_p: T.handle):
        length = T.int64()
        n = T.int64()
        k = T.int64()
        code_stride = T.int64()
        scale_stride = T.int64()
        ids = T.match_buffer(ids_p, (length,), "int64", align=8)
        codes = T.match_buffer(codes_p, (n, k), "uint8", strides=[code_stride, T.int64(1)], align=1)
        scale = T.match_buffer(scale_p, (n,), "float32", strides=[scale_stride], align=4)
        codebook = T.match_buffer(codebook_p, (256,), "float32", align=4)
        out = T.match_buffer(out_p, (length, k), "float32", align=4)
        for i in T.parallel(length):
            constants = T.meta_var(decoder.setup(codebook))
            _decode_row(isa, decoder, constants, codes, ids[i], scale[ids[i]], out, i, k)

    return embedding.with_attr("tirx.noalias", True)
