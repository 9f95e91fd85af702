"""The layout of a safetensors file: its header, parsed without trust and written byte by byte.

    8 bytes   length of the header, little-endian
    header    JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}, …}, spaces
    data      the tensors, from offset 0 on without gaps

The format's own library reads the same files; this parser exists because a packed file's header is checksummed as
bytes, because it bounds what it allocates, and because a writer must know the header's length before its numbers.
"""

import contextlib
import functools
import json
import math
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ggpass.errors import FormatError
from ggpass.packed.codec.native import crc32c
from ggpass.packed.dtypes import DTYPE_BITS, Sized
from ggpass.packed.untrusted import MAX_BYTES, open_regular, parse_json, reading

LENGTH_BYTES = 8

METADATA = "__metadata__"

#: The most that one system call reads; Linux stops short of 2 GiB.
READ_BYTES = 1 << 30

#: Read at a time for the fingerprint: it stays in the cache.
HASH_BYTES = 1 << 20


@dataclass(frozen=True)
class Entry(Sized):
    """One tensor of a file.

    Attributes:
        name: as in the state_dict.
        dtype: safetensors' name, as `F32`.
        shape: its dimensions.
        begin, end: its bytes, counted from the start of the data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    end: int = 0


@dataclass(frozen=True)
class Source:
    """A tensor that is read when it is needed.

    Attributes:
        entry: its name, dtype and shape.
        read: returns its bytes, uint8: all, or those from `begin` to `end`.
    """

    entry: Entry
    read: Callable[..., np.ndarray]


def check_dtype_and_shape(dtype: Any, shape: Any, name: str) -> tuple[str, tuple[int, ...]]:
    """Return a dtype and shape from JSON, as they should be.

    Raises:
        FormatError: a dtype that safetensors does not have, a shape that is no list of sizes.
    """
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FormatError(f"{name} has dtype {dtype!r:.40}, which is none of {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or not all(type(n) is int and 0 <= n < 1 << 63 for n in shape) or len(shape) > 64:
        raise FormatError(f"{name} has shape {shape!r:.40}, which is no list of sizes; fetch the file again")
    if math.prod(max(1, n) for n in shape) * DTYPE_BITS[dtype] >= 1 << 63:
        raise FormatError(f"{name} has shape {shape!r:.40}, which is beyond any memory; fetch the file again")
    return dtype, tuple(shape)


@dataclass(frozen=True)
class Layout:
    """A parsed header.

    Attributes:
        entries: by name, in the order of the data.
        metadata: what `__metadata__` holds.
        raw: the length and the header as they are in the file.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    raw: bytes = field(repr=False)

    @property
    def data_at(self) -> int:
        """Where the data starts in the file."""
        return len(self.raw)


def parse_layout(raw: bytes, data_bytes: int) -> Layout:
    """Return the layout that a header describes.

    Args:
        raw: the length and the header.
        data_bytes: how many bytes follow it in the file.

    Raises:
        FormatError: anything that the format forbids: unknown dtypes, sizes that do not match the offsets, overlapping
            tensors, gaps, missing or surplus bytes.
    """
    header = parse_json(raw[LENGTH_BYTES:], "the header")
    if not isinstance(header, dict):
        raise FormatError("the header is no JSON object; fetch the file again")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError("the header's metadata is not made of strings; fetch the file again")
    entries = [_parse_entry(name, value) for name, value in header.items()]
    # Empty tensors share their place with the next one, so they come first.
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    at = 0
    for entry in entries:
        if entry.begin != at:
            what = "overlaps the tensor before it" if entry.begin < at else "leaves a gap before it"
            raise FormatError(f"{entry.name} {what} (at byte {entry.begin} of the data); fetch the file again")
        at = entry.end
    if at != data_bytes:
        raise FormatError(f"the tensors take {at} bytes and the file holds {data_bytes}; it was cut off or added to")
    return Layout({entry.name: entry for entry in entries}, metadata, raw)


def _parse_entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{name} is not described by dtype, shape and data_offsets; fetch the file again")
    dtype, shape = check_dtype_and_shape(value["dtype"], value["shape"], name)
    offsets = value["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int for n in offsets):
        raise FormatError(f"{name} has data_offsets {offsets!r:.40}; fetch the file again")
    entry = Entry(name, dtype, shape, *offsets)
    if not 0 <= entry.begin <= entry.end or entry.end - entry.begin != entry.nbytes:
        raise FormatError(
            f"{name} lies at bytes {entry.begin} to {entry.end}, and {dtype} of shape {list(shape)} takes "
            f"{entry.nbytes}; fetch the file again"
        )
    return entry


def write_layout(entries: Mapping[str, Entry], metadata: Mapping[str, str], length: int | None = None) -> bytes:
    """Return the bytes of a header, filled up with spaces to a multiple of eight, or to `length` bytes in all."""
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    for name, entry in entries.items():
        offsets = [entry.begin, entry.end]
        header[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        raise FormatError(f"a tensor's name holds half a character ({error}); rename its module") from error
    whole = length or LENGTH_BYTES + (len(text) + 7) // 8 * 8
    if LENGTH_BYTES + len(text) > whole:
        raise ValueError(f"a header of {len(text)} bytes does not fit the {whole} reserved for it")
    return (whole - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little") + text.ljust(whole - LENGTH_BYTES)


class TensorFile(contextlib.AbstractContextManager["TensorFile"]):
    """An open safetensors file: its layout, and the bytes of one tensor at a time.

    Attributes:
        path: of the file.
        size: its bytes.
        layout: its parsed header.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the file and check its header.

        Raises:
            FormatError: no such file, no safetensors, or damaged; the message names the file.
        """
        self.path = Path(path)
        self._fd = -1
        self._map: np.ndarray | None = None
        with contextlib.ExitStack() as on_error, reading(self.path):
            self._fd = open_regular(self.path)
            on_error.callback(self.close)
            self.size = os.fstat(self._fd).st_size
            if self.size < LENGTH_BYTES:
                raise FormatError(f"{self.size} bytes are too few for a safetensors file; it was cut off")
            length = int.from_bytes(os.pread(self._fd, LENGTH_BYTES, 0), "little")
            if length > min(MAX_BYTES, self.size - LENGTH_BYTES):
                raise FormatError(
                    f"it claims a header of {length} bytes and has {self.size} in all; it is cut off or no safetensors"
                )
            raw = os.pread(self._fd, LENGTH_BYTES + length, 0)
            if len(raw) != LENGTH_BYTES + length:
                raise FormatError("its header could not be read to the end")
            self.layout = parse_layout(raw, self.size - len(raw))
            on_error.pop_all()

    def read(self, name: str, begin: int = 0, end: int | None = None, room: np.ndarray | None = None) -> np.ndarray:
        """Return the bytes `begin` to `end` of a tensor (all of them if left out), uint8, in `room` if it is given.

        Raises:
            FormatError: the file was cut off since it was opened.
        """
        entry = self.layout.entries[name]
        stop = entry.end - entry.begin if end is None else end
        data = np.empty(stop - begin, np.uint8) if room is None else room[: stop - begin]
        at, done = self.layout.data_at + entry.begin + begin, 0
        while done < data.size:
            got = os.preadv(self._fd, [data[done : done + READ_BYTES].data], at + done)
            if got == 0:
                raise FormatError(f"{self.path} was cut off while it was read, in {name}; fetch it again")
            done += got
        return data

    def view(self, name: str) -> np.ndarray:
        """The bytes of a tensor where the system maps the file, uint8, read-only; they stay valid after `close`."""
        if self._map is None:
            self._map = np.frombuffer(mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ), np.uint8)
        entry, at = self.layout.entries[name], self.layout.data_at
        return self._map[at + entry.begin : at + entry.end]

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """Yield the bytes of a tensor, HASH_BYTES at a time, uint8; a block is overwritten by the next one."""
        entry, block = self.layout.entries[name], np.empty(HASH_BYTES, np.uint8)
        for begin in range(0, entry.end - entry.begin, HASH_BYTES):
            yield self.read(name, begin, min(entry.end - entry.begin, begin + HASH_BYTES), block)

    def checksum(self, name: str, seed: int = 0) -> int:
        """Return the CRC-32C of a tensor's bytes, continuing `seed`."""
        return functools.reduce(lambda crc, block: crc32c(block, crc), self.blocks(name), seed)

    def fingerprint(self) -> str:
        """Return what changes with any byte of the file: its size, the CRC-32C of its header and of its data."""
        data = functools.reduce(lambda crc, name: self.checksum(name, crc), self.layout.entries, 0)
        return f"{self.size:x}-{crc32c(np.frombuffer(self.layout.raw, np.uint8)):08x}-{data:08x}"

    def close(self) -> None:
        """Give the file back; reading ends."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __exit__(self, *exception: object) -> None:
        self.close()
