"""The stored form of one coded array: header, table, index, chunks, padding.

    offset  size
         0     4  magic "GGC1"
         4     1  method: 0 raw, 1 constant, 2 rans, 3 exp-golomb
         5     1  type of the symbols (native.INTEGER_TYPES)
         6     1  rans: log2 of the slots; exp-golomb: the order
         7     1  exp-golomb: 0 signed, 1 ranked
         8     8  number of symbols
        16     4  symbols in a chunk (the last one may hold fewer)
        20     4  bytes of the table
        24     8  bytes in all
        32     4  CRC-32C of bytes 0…31, the table and the index
        36     …  table
         …  12·c  index: for each chunk the bytes of its code, the bytes of its patches, the CRC-32C of both
         …     …  the chunks, code and patches of one after the other
         …     …  zeros, so that no byte stands for more than MAX_EXPANSION symbols

All integers are little-endian. A chunk is decoded from its own bytes and the table alone: chunks are what threads share
and what random access reads. Every byte lies under a checksum or must be zero, so every flipped bit is found.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ggpass.errors import FormatError
from ggpass.packed.codec.native import INTEGER_TYPES, crc32c

MAGIC = b"GGC1"
RAW, CONSTANT, RANS, EXP_GOLOMB = range(4)

#: Part of a container as it is written; a view where copying would cost memory for nothing.
Piece = bytes | memoryview

#: The pieces of one container, the header first.
Array = list[Piece]

_HEADER = struct.Struct("<4sBBBBQIIQ")
_CHECK = struct.Struct("<I")
#: What opens a rans table, the number of its symbols, and the patches of a chunk, their number.
TABLE_COUNT = struct.Struct("<H")
PATCH_COUNT = struct.Struct("<I")
HEADER_BYTES = _HEADER.size + _CHECK.size
_INDEX_FIELDS = 3

#: Symbols that one stored byte may stand for, as in deflate (1032): what a decoder allocates stays in proportion to
#: what it was sent. At 0.05 bits a symbol a byte holds 160 of them.
MAX_EXPANSION = 1024

MAX_CHUNK = 1 << 24


@dataclass(frozen=True)
class Container:
    """A parsed container; its arrays are views of the stored bytes.

    Attributes:
        method: RAW, CONSTANT, RANS or EXP_GOLOMB.
        dtype: of the symbols.
        parameter: rans: log2 of the slots; exp-golomb: the order.
        ranked: exp-golomb: whether the table ranks the symbols.
        count: number of symbols.
        chunk: symbols in a chunk.
        table: (t,) uint8.
        index: (c, 3) uint32: code bytes, patch bytes, checksum.
        body: (b,) uint8, the chunks one after the other.
        check: the header's checksum, which covers those of the chunks.
        length: bytes in all.
    """

    method: int
    dtype: np.dtype
    parameter: int
    ranked: bool
    count: int
    chunk: int
    table: np.ndarray
    index: np.ndarray
    body: np.ndarray
    check: int
    length: int

    @cached_property
    def starts(self) -> np.ndarray:
        """(c + 1,) int64, where each chunk starts in the body."""
        sizes = self.index[:, 0].astype(np.int64) + self.index[:, 1]
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])

    def symbols_of(self, i: int) -> slice:
        """Which symbols chunk i holds; a constant array is one chunk."""
        chunk = self.count if self.method == CONSTANT else self.chunk
        return slice(i * chunk, min(self.count, (i + 1) * chunk))

    def code_of(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the code and the patches of chunk i, their checksum verified.

        Raises:
            FormatError: the chunk was damaged.
        """
        start, code, patches = int(self.starts[i]), int(self.index[i, 0]), int(self.index[i, 1])
        data = self.body[start : start + code + patches]
        if crc32c(data) != self.index[i, 2]:
            raise FormatError(
                f"chunk {i} of {len(self.index)} is damaged (its checksum does not match); fetch the file again"
            )
        return data[:code], data[code:]


def write(
    method: int,
    dtype: np.dtype,
    count: int,
    chunk: int,
    *,
    parameter: int = 0,
    ranked: bool = False,
    table: bytes = b"",
    parts: Sequence[tuple[Piece, bytes]] = (),
) -> list[Piece]:
    """Return the stored form in pieces, the header first; `parts` holds the code and the patches of each chunk."""
    rows = [
        (len(code), len(patches), crc32c(np.frombuffer(patches, np.uint8), crc32c(np.frombuffer(code, np.uint8))))
        for code, patches in parts
    ]
    index = np.array(rows, dtype="<u4").tobytes()
    used = HEADER_BYTES + len(table) + len(index) + sum(code + patches for code, patches, _ in rows)
    padding = max(0, -(-count // MAX_EXPANSION) - used)
    head = _HEADER.pack(
        MAGIC, method, INTEGER_TYPES.index(dtype), parameter, ranked, count, chunk, len(table), used + padding
    )
    check = _CHECK.pack(crc32c(np.frombuffer(head + table + index, np.uint8)))
    return [head + check + table + index, *(piece for part in parts for piece in part if piece), bytes(padding)]


def check_of(head: Piece) -> int:
    """Return the header's checksum, from the first piece that `write` returns."""
    (check,) = _CHECK.unpack_from(head, _HEADER.size)
    return int(check)


def check_of_arrays(checks: Sequence[int]) -> int:
    """check = CRC-32C of the header checksums of a payload's arrays, which cover their chunks."""
    return crc32c(np.array(checks, dtype="<u4").view(np.uint8))


def read(data: np.ndarray) -> Container:
    """Parse and check the container at the start of `data`; the chunks' own checksums wait until they are read.

    Args:
        data: (n,) uint8, may be longer than the container.

    Raises:
        FormatError: anything in it contradicts anything else; nothing was allocated for what it claims.
    """
    if data.size < HEADER_BYTES:
        raise FormatError(f"{data.size} bytes are too few for a coded array; the file was cut off")
    magic, method, kind, parameter, ranked, count, chunk, table_bytes, length = _HEADER.unpack_from(data.data)
    if magic != MAGIC:
        raise FormatError(
            f"a coded array starts with {MAGIC!r}, not {magic!r}; the file is corrupt or newer than this ggpass"
        )
    if method > EXP_GOLOMB or kind >= len(INTEGER_TYPES) or ranked > 1:
        raise FormatError(
            f"a coded array names method {method}, type {kind}, map {ranked}, which this ggpass does not know; "
            "update ggpass, or fetch the file again"
        )
    if not HEADER_BYTES + table_bytes <= length <= data.size:
        raise FormatError(f"a coded array claims {length} bytes where {data.size} are; the file was cut off")
    if count > MAX_EXPANSION * length:
        raise FormatError(f"a coded array claims {count} symbols in {length} bytes, more than any encoder writes")
    if not 1 <= chunk <= MAX_CHUNK:
        raise FormatError(f"a coded array claims chunks of {chunk} symbols; 1 to {MAX_CHUNK} are possible")
    chunks = 0 if method == CONSTANT else -(-count // chunk)
    body_at = HEADER_BYTES + table_bytes + 4 * _INDEX_FIELDS * chunks
    if body_at > length:
        raise FormatError(f"a coded array claims {chunks} chunks in {length} bytes; the file is corrupt")
    (check,) = _CHECK.unpack_from(data.data, _HEADER.size)
    if crc32c(data[HEADER_BYTES:body_at], seed=crc32c(data[: _HEADER.size])) != check:
        raise FormatError("the header of a coded array is damaged (its checksum does not match); fetch the file again")
    table, index = np.split(data[HEADER_BYTES:body_at], [table_bytes])
    index = index.copy().view("<u4").reshape(chunks, _INDEX_FIELDS)
    end = body_at + int(index[:, :2].sum(dtype=np.uint64))
    if end > length:
        raise FormatError(f"the chunks of a coded array take {end} bytes of {length}; the file is corrupt")
    if data[end:length].any():
        raise FormatError("the padding of a coded array is not zero; fetch the file again")
    dtype, body = INTEGER_TYPES[kind], data[body_at:end]
    return Container(method, dtype, parameter, bool(ranked), count, chunk, table, index, body, check, length)
