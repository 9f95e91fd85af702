"""encode_pieces: an array of integer symbols to bytes at its zero-order entropy.

Why an own coder, weighed by `benchmarks/codec.py` on the RF8 codes of all-MiniLM-L6-v2 (entropy 6.29 bits; speeds in
million symbols a second on one core, encode / decode):

* `constriction` (ANS, one symbol at a time): 6.29 bits, 176 / 35. As tight, but too slow to load from.
* zstd-3: 6.35 bits, 716 / 1040. Its Huffman code spends at least one bit on a symbol, so it is of no use on trained,
  sparse weights (0.05 to 1 bit), where entropy coding pays most; its FSE (tANS) serves lengths and offsets only.
* DeepCABAC (NNCodec): adaptive, bit by bit, 1 / 4. The weights of a matrix are close to independent, so adaptivity
  buys little and forbids interleaving.
* nvCOMP decodes on the GPU, in a format of its own whose library is closed, and these files must open anywhere. A
  static table, 32 lanes and independent chunks are what a GPU warp could decode, one lane a thread.

This coder: 6.31 bits, 200 / 1240, and 420 in decoding without AVX2.
"""

import functools
import struct
import threading
from collections.abc import Callable
from typing import Literal

import numpy as np

from ggpass.errors import FormatError
from ggpass.ggd.grid import Histogram
from ggpass.packed.codec import container, exp_golomb
from ggpass.packed.codec.container import CONSTANT, EXP_GOLOMB, MAX_CHUNK, PATCH_COUNT, RANS, RAW, TABLE_COUNT, Piece
from ggpass.packed.codec.model import Model, fit, histogram
from ggpass.packed.codec.native import address, check, integer_type, library
from ggpass.packed.codec.threads import run_all

Method = Literal["auto", "raw", "rans", "exp-golomb"]

#: Coded bytes a chunk aims at: its 140 bytes of states and index are then 0.1 % of it.
CHUNK_BYTES = 1 << 17
MIN_CHUNK = 1 << 16

#: Symbols of a chunk whose code is not shorter the longer it is: raw and exp-Golomb.
PLAIN_CHUNK = 1 << 18

#: The widest range of values for which symbols become table indices by a look-up rather than by binary search.
MAX_LOOKUP = 1 << 20

_NO_INDEX = 0xFFFF


def chunk_symbols(bits_a_symbol: float) -> int:
    """2^ceil(log2(8·CHUNK_BYTES / bits)), kept within [MIN_CHUNK, MAX_CHUNK]."""
    wanted = 8 * CHUNK_BYTES / max(bits_a_symbol, 1e-9)
    return min(MAX_CHUNK, max(MIN_CHUNK, 1 << int(np.ceil(np.log2(wanted)))))


def _blocks(symbols: np.ndarray, chunk: int) -> list[np.ndarray]:
    return [symbols[i : i + chunk] for i in range(0, symbols.size, chunk)]


def encode_pieces(
    symbols: np.ndarray,
    method: Method = "auto",
    *,
    order: int | None = None,
    mapping: Literal["signed", "ranked"] = "signed",
    threads: int = 1,
) -> list[Piece]:
    """Return the symbols at their zero-order entropy (rans) or in a prefix code (exp-golomb), lossless.

    Args:
        symbols: any shape, any integer dtype; the shape is the caller's to keep.
        method: `auto` takes the shortest of constant, raw and rans.
        order: exp-golomb: the order k; the best one for these symbols if left out.
        mapping: exp-golomb: how signed symbols become numbers.
        threads: how many chunks to encode at a time.

    Returns:
        Pieces to be written one after the other; raw ones are views of `symbols`.

    Raises:
        FormatError: not integers, or symbols beyond ±2^61 where a code must hold them.
    """
    flat = np.ascontiguousarray(symbols).reshape(-1)
    flat = flat.astype(flat.dtype.newbyteorder("<"), copy=False)
    integer_type(flat.dtype)
    if method not in ("auto", "raw", "rans", "exp-golomb"):
        raise FormatError(f"there is no coding method {method!r}; choose auto, raw, rans or exp-golomb")
    limit = exp_golomb.MAX_MAGNITUDE
    codable = flat.dtype.itemsize < 8 or not flat.size or (-limit <= int(flat.min()) and int(flat.max()) <= limit)
    if not codable and method in ("rans", "exp-golomb"):
        raise FormatError(f"{method} codes symbols within ±2^61; choose auto or raw for these")
    if method == "raw" or not codable or flat.size == 0:
        return _encode_raw(flat)
    counted = histogram(flat)
    if method == "exp-golomb":
        return _encode_exp_golomb(flat, counted, order, mapping, threads)
    if len(counted.values) == 1:
        return container.write(CONSTANT, flat.dtype, flat.size, MAX_CHUNK, table=flat[:1].tobytes())
    model = fit(counted)
    if method == "auto" and model.cost >= 8 * flat.nbytes:
        return _encode_raw(flat)
    coded = _encode_rans(flat, counted, model, threads)
    raw = container.HEADER_BYTES + flat.nbytes
    return _encode_raw(flat) if method == "auto" and sum(map(len, coded)) > raw else coded


def _encode_raw(flat: np.ndarray) -> list[Piece]:
    parts = [(block.view(np.uint8).data, b"") for block in _blocks(flat, PLAIN_CHUNK)]
    return container.write(RAW, flat.dtype, flat.size, PLAIN_CHUNK, parts=parts)


def _encode_exp_golomb(
    flat: np.ndarray, counted: Histogram, order: int | None, mapping: str, threads: int
) -> list[Piece]:
    if mapping not in ("signed", "ranked"):
        raise FormatError(f"exp-Golomb maps symbols 'signed' or 'ranked', not {mapping!r}")
    ranked = mapping == "ranked"
    numbers: Callable[[np.ndarray], np.ndarray] = exp_golomb.signed_map
    values, counts = counted.values.numpy(), counted.counts.numpy()
    distinct, table = exp_golomb.signed_map(values), b""
    if ranked:
        # By falling count, ties by rising magnitude, then the positive one: rank 0 is the most frequent.
        ranks = values[np.lexsort((-values, np.abs(values), -counts))]
        rank_of = np.empty(len(ranks), np.uint64)
        rank_of[np.searchsorted(values, ranks)] = np.arange(len(ranks), dtype=np.uint64)
        numbers = lambda block: rank_of[np.searchsorted(values, block.astype(np.int64))]  # noqa: E731
        distinct, table = rank_of, exp_golomb.pack_numbers(exp_golomb.signed_map(ranks))
        table = struct.pack("<I", len(ranks)) + table
    k = exp_golomb.best_order(distinct, counts) if order is None else order
    if not 0 <= k <= exp_golomb.MAX_ORDER:
        raise FormatError(f"an exp-Golomb order lies in 0…{exp_golomb.MAX_ORDER}, not {k}")
    tasks = [
        functools.partial(lambda b: (exp_golomb.encode(numbers(b), k), b""), b) for b in _blocks(flat, PLAIN_CHUNK)
    ]
    parts = run_all(tasks, threads)
    return container.write(
        EXP_GOLOMB, flat.dtype, flat.size, PLAIN_CHUNK, parameter=k, ranked=ranked, table=table, parts=parts
    )


class _Indexer:
    """Symbols to indices of the model's table, and to the patches where they have none."""

    def __init__(self, model: Model, dtype: np.dtype) -> None:
        self.dtype, self.bytes = dtype, dtype.itemsize == 1
        if self.bytes:
            # A byte is its own index: the decoder then writes symbols without another look-up.
            slot_of = model.values.astype(dtype).view(np.uint8).astype(np.int64)
            self.frequencies = np.zeros(256, np.uint32)
            self.low = int(np.iinfo(dtype).min)
        else:
            slot_of = np.arange(len(model.values))
            self.frequencies = np.zeros(len(model.values), np.uint32)
            self.low = int(model.values[0])
        self.frequencies[slot_of] = model.frequencies
        self.filler = int(slot_of[model.mode])
        self.width = 1 if len(self.frequencies) <= 256 else 2
        self.values, self.slot_of, self.patches = model.values, slot_of, model.patches
        span = int(model.values[-1]) - self.low + 1
        self.lookup: np.ndarray | None = None
        if span <= MAX_LOOKUP:
            self.lookup = np.full(span, _NO_INDEX, np.uint16)
            self.lookup[model.values - self.low] = slot_of

    def __call__(self, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices (uint8 or uint16) and the positions of the patches (uint64)."""
        if self.bytes and not self.patches:
            return block.view(np.uint8), np.zeros(0, np.uint64)
        out = np.empty(block.size, np.uint8 if self.width == 1 else np.uint16)
        if self.lookup is None:
            at = np.searchsorted(self.values, block.astype(np.int64)).clip(max=len(self.values) - 1)
            missing = self.values[at] != block
            out[:] = np.where(missing, self.filler, self.slot_of[at])
            return out, np.flatnonzero(missing).astype(np.uint64)
        positions = np.empty(min(block.size, self.patches), np.uint64)
        found = library().ggp_to_index(
            *(address(block), integer_type(self.dtype), block.size),
            *(self.low, len(self.lookup), address(self.lookup), self.filler),
            *(address(out), self.width, address(positions), positions.size),
        )
        return out, positions[: check(found, "an array that changed while it was encoded")]


_kept = threading.local()


def _room(size: int) -> np.ndarray:
    """At least `size` bytes of this thread's own: fresh memory for each chunk costs faults that threads share."""
    if getattr(_kept, "room", np.empty(0)).size < size:
        _kept.room = np.empty(size, np.uint8)
    room: np.ndarray = _kept.room
    return room


def _patches(block: np.ndarray, positions: np.ndarray) -> bytes:
    if not positions.size:
        return b""
    gaps = np.diff(positions, prepend=np.uint64(0)) - np.uint64(1)
    gaps[0] = positions[0]
    values = exp_golomb.signed_map(block[positions])
    return PATCH_COUNT.pack(len(positions)) + exp_golomb.pack_numbers(gaps) + exp_golomb.pack_numbers(values)


def _encode_rans(flat: np.ndarray, counted: Histogram, model: Model, threads: int) -> list[Piece]:
    index = _Indexer(model, flat.dtype)
    native = library()

    def encode_block(block: np.ndarray) -> tuple[bytes, bytes]:
        symbols, positions = index(block)
        scratch = np.empty(native.ggp_rans_scratch_bytes(len(index.frequencies)), np.uint8)
        out = _room(native.ggp_rans_bound(block.size))
        written = native.ggp_rans_encode(
            *(address(symbols), index.width, symbols.size),
            *(address(index.frequencies), len(index.frequencies), model.bits),
            *(address(scratch), address(out), out.size),
        )
        code = out[: check(written, "an array that changed while it was encoded")].tobytes()
        return code, _patches(block, positions)

    gaps = np.diff(model.values).astype(np.uint64) - np.uint64(1)
    table = (
        TABLE_COUNT.pack(len(model.values))
        + exp_golomb.pack_numbers(exp_golomb.signed_map(model.values[:1]))
        + exp_golomb.pack_numbers(gaps)
        + exp_golomb.pack_numbers(model.frequencies.astype(np.uint64) - np.uint64(1))
    )
    chunk = chunk_symbols(counted.bits)
    parts = run_all([functools.partial(encode_block, b) for b in _blocks(flat, chunk)], threads)
    return container.write(RANS, flat.dtype, flat.size, chunk, parameter=model.bits, table=table, parts=parts)
