"""Writer: a safetensors file, written tensor by tensor; assemble: tensors, plain or at their entropy, to a packed file.

A file has room for the header at its front, and is opened at the end. Beside the unfinished file lies a journal: one
JSON line with the plan, then one for each tensor that is finished. After a kill the same plan goes on behind the last
tensor whose bytes still have the checksum that its line states.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ggpass.errors import FormatError, GgpassError
from ggpass.packed.codec.container import Array, Piece, check_of, check_of_arrays
from ggpass.packed.codec.native import crc32c
from ggpass.packed.dtypes import DTYPE_BITS
from ggpass.packed.layout import Entry, Source, TensorFile, write_layout
from ggpass.packed.manifest import Manifest, Stored, parse_manifest, seal
from ggpass.packed.untrusted import parse_json

_VERIFY_BYTES = 1 << 24

#: The largest offset a header may come to hold, for the room that is reserved before they are known.
_ANY_SIZE = 10**15

Progress = Callable[[str, int, int], None]


def silent(name: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Record:
    """One finished tensor.

    Attributes:
        name: of the tensor.
        begin, end: its bytes, counted from the start of the data.
        crc: CRC-32C of these bytes.
        note: the caller's own, for when it resumes.
    """

    name: str
    begin: int
    end: int
    crc: int
    note: dict[str, Any]


def _open(path: Path) -> BinaryIO:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return os.fdopen(fd, "r+b", buffering=0)


class Writer(contextlib.AbstractContextManager["Writer"]):
    """Writes one file of a Staging; use as a context manager, and call `finish` at the end.

    Attributes:
        path: the file.
        records: the tensors that are finished, by name; not empty from the start if a run was resumed.
        finished: whether an earlier run with the same plan has written the whole file.
    """

    def __init__(self, path: Path, work: Path, header_bytes: int, plan: str = "") -> None:
        """Open or resume.

        Args:
            path: the file, in a Staging; it appears when it is whole.
            work: a directory that holds nothing but this run's, or an equal one's, unfinished file and its journal.
            header_bytes: the room for the header, its length included.
            plan: what this run does, in full: the content of its source and its settings. Only a run with the same plan
                is resumed.
        """
        self.path, self.header_bytes = path, header_bytes
        self.records: dict[str, Record] = {}
        self._part_path, self._at = work / "part", 0
        with contextlib.ExitStack() as on_error:
            self._part = on_error.enter_context(_open(self._part_path))
            self._journal = on_error.enter_context(_open(work / "journal"))
            first, *lines = self._journal.read().split(b"\n")
            resumed = first == plan.encode()
            self.finished = resumed and path.exists()
            # The last line has no newline: it is empty, or was cut off.
            for line in lines[:-1] if resumed and not self.finished else ():
                record = self._verified(line)
                if record is None:
                    break
                self.records[record.name] = record
                self._at = max(self._at, record.end)
            self._journal.truncate(0)
            self._journal.seek(0)
            self._journal.write(plan.encode() + b"\n")
            for record in self.records.values():
                self._log(record)
            on_error.pop_all()

    def _verified(self, line: bytes) -> Record | None:
        try:
            record = Record(**parse_json(line, "the journal"))
            if not 0 <= record.begin <= record.end:
                return None
        except (TypeError, ValueError):
            return None
        crc, left = 0, record.end - record.begin
        self._part.seek(self.header_bytes + record.begin)
        while left:
            data = np.frombuffer(self._part.read(min(left, _VERIFY_BYTES)), np.uint8)
            if not data.size:
                return None
            crc, left = crc32c(data, crc), left - data.size
        return record if crc == record.crc else None

    def _log(self, record: Record) -> None:
        self._journal.write(json.dumps(record.__dict__, ensure_ascii=False).encode() + b"\n")

    def write(
        self, name: str, pieces: Iterable[Piece], note: dict[str, Any] | None = None, begin: int | None = None
    ) -> Record:
        """Write one tensor.

        Args:
            name: of the tensor.
            pieces: its bytes.
            note: kept in the journal; the caller may fill it in while it yields the pieces.
            begin: its place in the data; behind all others if left out.

        Raises:
            OSError: the disk is full or refuses; what is finished stays for the next run.
        """
        begin = self._at if begin is None else begin
        self._part.seek(self.header_bytes + begin)
        crc, end = 0, begin
        for piece in pieces:
            crc, end = crc32c(np.frombuffer(piece, np.uint8), crc), end + len(piece)
            self._put(piece)
        record = Record(name, begin, end, crc, note or {})
        self._log(record)
        self.records[name], self._at = record, max(self._at, end)
        return record

    def _put(self, piece: Piece) -> None:
        view = memoryview(piece)
        while view:
            view = view[self._part.write(view) :]

    def finish(self, header: bytes, check: Callable[[Path], object] = lambda path: TensorFile(path).close()) -> None:
        """Write the header, make everything last, open the file once, and let it appear.

        Args:
            header: of `header_bytes`.
            check: opens the file as its readers will.

        Raises:
            GgpassError: what was written does not open.
            OSError: the disk is full or refuses.
        """
        if len(header) != self.header_bytes:
            raise ValueError(f"a header of {len(header)} bytes where {self.header_bytes} are reserved")
        self._part.seek(0)
        self._put(header)
        self._part.truncate(self.header_bytes + self._at)
        os.fsync(self._part.fileno())
        try:
            check(self._part_path)
        except FormatError as error:
            self._journal.truncate(0)  # nothing may go on from what is damaged
            raise GgpassError(
                f"nothing was replaced, since what was written does not open again ({error}); run the same command "
                "again, and report it if it happens twice"
            ) from error
        self._part_path.replace(self.path)

    def __exit__(self, *exception: object) -> None:
        self._part.close()
        self._journal.close()


@dataclass(frozen=True)
class Item(Source):
    """One tensor to store.

    Attributes:
        entry, read: where it comes from.
        encode: returns the manifest's entry, its check still 0, and the coded arrays; None if it stays as it is.
        persistent: as the manifest has it.
    """

    encode: Callable[[], tuple[Stored, Iterator[Array]]] | None = None
    persistent: bool = True


def assemble(
    path: Path,
    work: Path,
    items: Iterable[Item],
    *,
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
    kernels: Mapping[str, bytes] | None = None,
    plan: str = "",
    progress: Progress = silent,
) -> None:
    """Write one packed file, in a Staging.

    Args:
        path, work, plan: as `Writer` takes them.
        items: in the order of the manifest.
        aliases: names that stand for another one's tensor.
        metadata: strings to keep in the file.
        kernels: GPU kernels by name.
        progress: called with a tensor's name, the bytes done and the bytes in all.

    Raises:
        FormatError, WeightError: as `encode` raises them.
        OSError: the disk is full or refuses.
    """
    items, kernels = list(items), dict(kernels or {})
    # Plain tensors come first, the widest elements ahead, so that all lie aligned for tools that map the file.
    order = sorted(items, key=lambda item: (item.encode is not None, -DTYPE_BITS[item.entry.dtype]))
    manifest = Manifest({}, dict(aliases), dict(metadata))
    room = _room(items, kernels, manifest)
    total, done = sum(item.entry.nbytes for item in items), 0
    with Writer(path, work, room, plan) as writer:
        if writer.finished:
            return
        entries: dict[str, Entry] = {}
        stored: dict[str, Stored] = {}
        for item in order:
            name = item.entry.name
            progress(name, done, total)
            record = writer.records.get(name) or _write(writer, item)
            own = {"shape": item.entry.shape, "persistent": item.persistent}
            stored[name] = Stored(**{**record.note, **own})
            if item.encode is None:
                stored[name] = replace(stored[name], check=record.crc)
                entries[name] = replace(item.entry, begin=record.begin, end=record.end)
            else:
                entries[name] = _bytes_entry(name, record.begin, record.end)
            done += item.entry.nbytes
        checks = {}
        for name, data in kernels.items():
            record = writer.records.get(name) or writer.write(name, [data])
            entries[name], checks[name] = _bytes_entry(name, record.begin, record.end), record.crc
        progress("", total, total)
        in_order = {item.entry.name: stored[item.entry.name] for item in items}
        whole = replace(manifest, tensors=in_order, kernels=checks)
        writer.finish(seal(write_layout(entries, whole.as_metadata(), room)), _check_packed)


def _check_packed(path: Path) -> None:
    """Raise FormatError if a file is no packed file, as its readers will see it."""
    with TensorFile(path) as file:
        parse_manifest(file.layout)


def _bytes_entry(name: str, begin: int, end: int) -> Entry:
    return Entry(name, "U8", (end - begin,), begin, end)


def _room(items: list[Item], kernels: Mapping[str, bytes], manifest: Manifest) -> int:
    """Return the bytes that the header cannot exceed: with the largest numbers everywhere."""
    worst = Stored(
        "codes", "F8_E4M3", (), 2**32 - 1, "x" * 24, "0" * 16, transposed=True, persistent=False, stack=2**48
    )
    largest = {item.entry.name: replace(worst, shape=item.entry.shape) for item in items}
    entries = {
        item.entry.name: replace(item.entry, begin=_ANY_SIZE, end=_ANY_SIZE)
        if item.encode is None
        else _bytes_entry(item.entry.name, _ANY_SIZE, 2 * _ANY_SIZE)
        for item in items
    }
    entries |= {name: _bytes_entry(name, _ANY_SIZE, 2 * _ANY_SIZE) for name in kernels}
    whole = replace(manifest, tensors=largest, kernels=dict.fromkeys(kernels, 2**32 - 1))
    return len(write_layout(entries, whole.as_metadata()))


def _write(writer: Writer, item: Item) -> Any:
    entry = item.entry
    if item.encode is None:
        return writer.write(entry.name, [item.read().data], Stored("plain", entry.dtype, entry.shape).__dict__)
    stored, arrays = item.encode()
    note: dict[str, Any] = {}

    def pieces() -> Iterator[Piece]:
        checks = []
        for array in arrays:
            checks.append(check_of(array[0]))
            yield from array
        note.update(replace(stored, check=check_of_arrays(checks)).__dict__)

    return writer.write(entry.name, pieces(), note)
