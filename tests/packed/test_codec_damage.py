"""Every corruption of a coded array is found, as a FormatError, without a crash and without a large allocation."""

import contextlib
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.coding import encode

from ggpass import FormatError
from ggpass.packed.codec import container
from ggpass.packed.codec.decoder import decode
from ggpass.packed.codec.native import crc32c

RNG = np.random.default_rng(0)
SAMPLES = {
    "bytes": encode(RNG.binomial(40, 0.5, 3000).astype(np.uint8)),
    "wide": encode(np.append(np.round(RNG.standard_normal(3000) * 200), [2**30, -5 * 10**8]).astype(np.int32)),
    "sparse": encode((RNG.random(5000) < 0.01).astype(np.int8)),
    "raw": encode(RNG.integers(0, 2**32, 300).astype(np.uint32), "raw"),
    "constant": encode(np.full(5000, 7, np.int16)),
    "signed": encode(np.round(RNG.standard_normal(2000) * 3).astype(np.int8), "exp-golomb"),
    "ranked": encode(np.round(RNG.standard_normal(2000) * 3).astype(np.int8), "exp-golomb", mapping="ranked"),
}


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


@pytest.mark.parametrize("name", SAMPLES)
def test_every_flipped_bit_is_found(name: str) -> None:
    data = SAMPLES[name]
    step = max(1, len(data) * 8 // 3000)
    bits = [*range(min(8 * 200, 8 * len(data))), *range(0, 8 * len(data), step)]
    for bit in bits:
        with pytest.raises(FormatError):
            decode(flipped(data, bit))


@pytest.mark.parametrize("name", SAMPLES)
def test_truncation_at_any_byte_is_found(name: str) -> None:
    data = SAMPLES[name]
    for length in {*range(min(200, len(data))), *range(0, len(data), max(1, len(data) // 300))}:
        with pytest.raises(FormatError):
            decode(data[:length])
    with pytest.raises(FormatError):
        decode(data + b"\0")


def test_swapped_chunks_are_found() -> None:
    symbols = RNG.integers(0, 250, 3 * (1 << 17)).astype(np.uint8)
    data = bytearray(encode(symbols, "rans"))
    parsed = container.read(np.frombuffer(bytes(data), np.uint8))
    size = int(parsed.index[0, :2].sum())
    start = len(data) - int(parsed.starts[-1]) - (parsed.length - len(data))
    body = bytes(data[start:])
    swapped = bytes(data[:start]) + body[size : 2 * size] + body[:size] + body[2 * size :]
    with pytest.raises(FormatError, match="chunk"):
        decode(swapped)


def resealed(data: bytes, offset: int, value: bytes) -> bytes:
    """A header field replaced, and the header's checksum made right: what a hostile writer would send."""
    changed = bytearray(data)
    changed[offset : offset + len(value)] = value
    table, count, chunk = struct.unpack_from("<I", changed, 20)[0], *struct.unpack_from("<QI", changed, 8)
    end = container.HEADER_BYTES + table + 12 * (-(-count // chunk) if chunk else 0)
    array = np.frombuffer(bytes(changed), np.uint8)
    if end <= len(changed):
        crc = crc32c(array[container.HEADER_BYTES : end], crc32c(array[:32]))
        changed[32:36] = struct.pack("<I", crc)
    return bytes(changed)


HOSTILE = [
    (8, struct.pack("<Q", 2**63)),  # symbols
    (8, struct.pack("<Q", 2**40)),
    (8, struct.pack("<Q", 3001)),
    (16, struct.pack("<I", 0)),  # symbols in a chunk
    (16, struct.pack("<I", 2**32 - 1)),
    (16, struct.pack("<I", 1)),
    (20, struct.pack("<I", 2**32 - 1)),  # bytes of the table
    (20, struct.pack("<I", 0)),
    (24, struct.pack("<Q", 2**63)),  # bytes in all
    (24, struct.pack("<Q", 0)),
    (4, b"\x09"),  # method
    (5, b"\x09"),  # type
    (6, b"\x1f"),  # slots
    (6, b"\x00"),
    (7, b"\x02"),  # map
]


@pytest.mark.parametrize("name", ["bytes", "wide", "sparse"])
@pytest.mark.parametrize(("offset", "value"), HOSTILE)
def test_hostile_headers_are_refused_without_allocating(name: str, offset: int, value: bytes) -> None:
    data = resealed(SAMPLES[name], offset, value)
    if data == SAMPLES[name]:
        return
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_what_is_allocated_stays_in_proportion() -> None:
    """The longest array that a byte may stand for is bounded, and an encoder keeps to it."""
    coded = encode(np.zeros(5_000_000, np.uint8))
    assert len(coded) >= 5_000_000 // container.MAX_EXPANSION
    assert decode(coded).size == 5_000_000


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.data())
def test_resealed_garbage_never_crashes(name: str, data: st.DataObject) -> None:
    """Behind a right checksum anything may stand: an error or symbols come back, nothing else."""
    sample = SAMPLES[name]
    offset = data.draw(st.integers(4, len(sample) - 1))
    damaged = resealed(sample, offset, data.draw(st.binary(min_size=1, max_size=12))[: len(sample) - offset])
    parsed_end = 36 + struct.unpack_from("<I", damaged, 20)[0]
    if (
        parsed_end + 12 <= len(damaged)
        and struct.unpack_from("<I", damaged, 16)[0] >= struct.unpack_from("<Q", damaged, 8)[0]
    ):
        code, patches = struct.unpack_from("<II", damaged, parsed_end)  # one chunk: make its checksum right too
        body = np.frombuffer(damaged, np.uint8)[parsed_end + 12 :][: code + patches]
        damaged = resealed(damaged, parsed_end + 8, struct.pack("<I", crc32c(body)))
    for portable in (False, True):
        with contextlib.suppress(FormatError):
            decode(damaged, portable=portable)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode(data)
    with pytest.raises(FormatError):
        decode(b"GGC1" + data)
