"""R's serialized objects, as far as data packages need them: NULL, vectors of numbers and strings, and lists.

The layout is that of `serialize` and `lazyLoadDB` in "R Internals", 1.8: big-endian ("X"), versions 2 and 3. Nothing is
evaluated; a type that is not listed here is an error, and no length is trusted before the bytes are there.
"""

from __future__ import annotations

import struct
import zlib
from typing import Any

from .fetch import DataError

LARGEST = 1 << 26  # bytes that one object may take; a novel takes 1 MB
DEEPEST = 20

_NULL, _SYMBOL, _PAIRS, _STRING, _LOGICAL, _INTEGER, _DOUBLE, _STRINGS, _LIST = 0, 1, 2, 9, 10, 13, 14, 16, 19
_NULL_VALUE, _REFERENCE = 254, 255
_HAS_ATTRIBUTES, _HAS_TAG = 1 << 9, 1 << 10
_LATIN1 = 1 << 14


class _Reader:
    def __init__(self, content: bytes, name: str) -> None:
        self.content, self.name, self.at, self.symbols = content, name, 0, [""]

    def broken(self, reason: str) -> DataError:
        return DataError(f"{self.name} is no R object that can be read here: {reason} at byte {self.at}; get it anew")

    def take(self, count: int) -> bytes:
        if count < 0 or count > len(self.content) - self.at:
            raise self.broken(f"{count} bytes should follow")
        self.at += count
        return self.content[self.at - count : self.at]

    def integer(self) -> int:
        return int.from_bytes(self.take(4), "big", signed=True)

    def numbers(self, letter: str, size: int) -> list[Any]:
        count = self.integer()
        return list(struct.unpack(f">{count}{letter}", self.take(count * size)))

    def head(self) -> None:
        if self.take(2) != b"X\n":
            raise self.broken("the mark of the big-endian form is missing")
        version, _writer, _least = (self.integer() for _ in range(3))
        if version not in (2, 3):
            raise self.broken(f"version {version} is neither 2 nor 3")
        if version == 3:
            self.take(self.integer())  # the native encoding; every string says its own

    def item(self, depth: int = 0) -> Any:
        if depth > DEEPEST:
            raise self.broken(f"lists are nested deeper than {DEEPEST}")
        flags = self.integer()
        kind = flags & 0xFF
        if kind in (_NULL, _NULL_VALUE):
            return None
        if kind == _REFERENCE:
            return self.reference(flags >> 8 or self.integer())
        if kind == _SYMBOL:
            self.symbols.append(self.text(depth))
            return self.symbols[-1]
        if kind == _STRING:
            return self.string(flags)
        if kind == _PAIRS:
            return self.pairs(flags, depth)
        return self.vector(kind, flags, depth)

    def reference(self, index: int) -> str:
        if not 0 < index < len(self.symbols):
            raise self.broken(f"symbol {index} is referred to before it came")
        return self.symbols[index]

    def string(self, flags: int) -> str | None:
        length = self.integer()
        if length == -1:
            return None  # NA
        raw = self.take(length)
        try:
            return raw.decode("latin-1" if flags & _LATIN1 else "utf-8")
        except UnicodeDecodeError as error:
            raise self.broken(f"a string is not UTF-8 ({error.reason})") from error

    def text(self, depth: int) -> str:
        found = self.item(depth + 1)
        if not isinstance(found, str):
            raise self.broken("a name is no string")
        return found

    def pairs(self, flags: int, depth: int) -> dict[str, Any]:
        """A pairlist: links of (attributes, tag, value), each of which says what the next one is."""
        found: dict[str, Any] = {}
        while flags & 0xFF == _PAIRS:
            if flags & _HAS_ATTRIBUTES:
                self.item(depth + 1)
            tag = self.text(depth) if flags & _HAS_TAG else str(len(found))
            found[tag] = self.item(depth + 1)
            flags = self.integer()
        if flags & 0xFF not in (_NULL, _NULL_VALUE):
            raise self.broken("a pairlist does not end")
        return found

    def vector(self, kind: int, flags: int, depth: int) -> Any:
        if kind in (_LOGICAL, _INTEGER):
            values = self.numbers("i", 4)
        elif kind == _DOUBLE:
            values = self.numbers("d", 8)
        elif kind in (_STRINGS, _LIST):
            values = self.items(depth, strings=kind == _STRINGS)
        else:
            raise self.broken(f"type {kind} is not among NULL, numbers, strings and lists")
        attributes = self.item(depth + 1) if flags & _HAS_ATTRIBUTES else None
        names = attributes.get("names") if isinstance(attributes, dict) else None
        if kind == _LIST and isinstance(names, list) and len(names) == len(values):
            return dict(zip(map(str, names), values))
        return values

    def items(self, depth: int, strings: bool) -> list[Any]:
        count, found = self.integer(), []
        if count < 0:
            raise self.broken(f"a count of {count} stands")
        for _ in range(count):  # one by one: a false count meets the end of the bytes
            found.append(self.item(depth + 1))
            if strings and not isinstance(found[-1], str | None):
                raise self.broken("an element of a character vector is no string")
        return found


def unserialize(content: bytes, name: str) -> Any:
    """The object in `content`: None, a list of numbers or strings, or for a list with names, a dict.

    Raises:
        DataError: it is damaged, or of a type that is not read here.
    """
    reader = _Reader(content, name)
    reader.head()
    found = reader.item()
    if reader.at != len(content):
        raise reader.broken(f"{len(content) - reader.at} bytes are left over")
    return found


def lazy_data(index: bytes, base: bytes, name: str) -> dict[str, Any]:
    """The objects of a package's lazy-load data base: the files `NAME.rdx` and `NAME.rdb`.

    Raises:
        DataError: a file is damaged, or not compressed with zlib.
    """
    variables = unserialize(_inflate(index, 16 + zlib.MAX_WBITS, f"{name}.rdx"), f"{name}.rdx")
    places = variables.get("variables") if isinstance(variables, dict) else None
    if not isinstance(places, dict):
        raise DataError(f"{name}.rdx lists no variables; get the file anew")
    found = {}
    for variable, place in places.items():
        if not (isinstance(place, list) and len(place) == 2 and all(isinstance(part, int) for part in place)):
            raise DataError(f"{name}.rdx gives no place for {variable}; get the file anew")
        start, length = place
        stored = base[start : start + length]
        if start < 0 or len(stored) != length or length < 4:
            raise DataError(f"{name}.rdb ends before {variable}; get the file anew")
        content = _inflate(stored[4:], zlib.MAX_WBITS, variable)
        if len(content) != int.from_bytes(stored[:4], "big"):
            raise DataError(f"{variable} in {name}.rdb has another length than it says; get the file anew")
        found[variable] = unserialize(content, variable)
    return found


def _inflate(content: bytes, window: int, name: str) -> bytes:
    stream = zlib.decompressobj(window)
    try:
        inflated = stream.decompress(content, LARGEST)
    except zlib.error as error:
        raise DataError(f"{name} cannot be decompressed ({error}); get the file anew") from error
    if not stream.eof or stream.unused_data:
        raise DataError(f"{name} is cut short, too long, or larger than {LARGEST >> 20} MiB; get the file anew")
    return inflated
