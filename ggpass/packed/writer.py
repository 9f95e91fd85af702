"""Writer: a safetensors file written under another name, and renamed only when it is whole and opens again.

A run with a plan can be resumed. Beside `model.safetensors` lie, until it ends, `.model.safetensors.ggpass-part` with
room for the header at its front, and `.model.safetensors.ggpass-journal`: one JSON line with the plan, then one for
each tensor that is finished. After a kill the same plan goes on behind the last tensor whose bytes still have the
checksum that its line states.

A run without a plan writes what is only in memory, so nothing of it can be resumed: its part has a unique name, and
goes if the run fails.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ggpass.errors import FormatError, GgpassError
from ggpass.packed.codec import crc32c
from ggpass.packed.codec.container import Piece
from ggpass.packed.layout import TensorFile
from ggpass.packed.strict_json import parse_json

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # no such locks on this system: two packs into one file are not told apart
    flock = None  # type: ignore[assignment]

PART_SUFFIX = ".ggpass-part"
JOURNAL_SUFFIX = ".ggpass-journal"
_VERIFY_BYTES = 1 << 24


def part_of(path: Path) -> Path:
    """The name under which a file or directory is written."""
    return path.with_name(f".{path.name}{PART_SUFFIX}")


def journal_of(path: Path) -> Path:
    """Where the finished tensors of an unfinished file are listed."""
    return path.with_name(f".{path.name}{JOURNAL_SUFFIX}")


def sync_directory(path: Path) -> None:
    """Make a rename in this directory last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Record:
    """One finished tensor.

    Attributes:
        name: of the tensor.
        begin, end: its bytes, counted from the start of the data.
        crc: CRC-32C of these bytes.
        note: what the caller wants back when it resumes.
    """

    name: str
    begin: int
    end: int
    crc: int
    note: dict[str, Any]


class Writer:
    """Writes one file; use as a context manager, and call `finish` at the end.

    Attributes:
        path: the final name.
        records: the tensors that are finished, by name; not empty from the start where a run was resumed.
    """

    def __init__(self, path: Path, header_bytes: int, plan: str | None = None) -> None:
        """Open or resume.

        Args:
            path: the final name.
            header_bytes: the room for the header, its length included.
            plan: what this run does, in full: the content of its source and its settings. Only a run with the same plan
                is resumed. None: this run is never resumed.

        Raises:
            GgpassError: the directory cannot be written, or another process is packing into this file.
        """
        self.path, self.header_bytes = path, header_bytes
        self.records: dict[str, Record] = {}
        self._resumable = plan is not None
        self._part_path = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PART_SUFFIX}")
        self._journal: BinaryIO | None = None
        self._at = 0
        if self._resumable:
            self._part_path = part_of(path)
        with self._explained():
            only_ours = 0 if self._resumable else os.O_EXCL
            flags = os.O_RDWR | os.O_CREAT | only_ours | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
            fd = os.open(self._part_path, flags, 0o666)
            self._part: BinaryIO = os.fdopen(fd, "r+b", buffering=0)
            try:
                if plan is not None:
                    self._lock()
                    self._resume(plan)
                else:
                    self._part.truncate(header_bytes)
            except BaseException:
                self.close()
                raise

    def _lock(self) -> None:
        if flock is None:
            return
        try:
            flock(self._part, LOCK_EX | LOCK_NB)
        except OSError as error:
            raise GgpassError(f"another process is writing {self.path}; wait for it, or choose another name") from error

    def _resume(self, plan: str) -> None:
        lines = journal_of(self.path).read_bytes().split(b"\n") if journal_of(self.path).exists() else []
        if lines and lines[0] == plan.encode():
            for line in lines[1:-1]:  # the last one has no newline: it is empty, or was cut off
                record = self._verified(line)
                if record is None:
                    break
                self.records[record.name] = record
                self._at = record.end
        self._part.truncate(self.header_bytes + self._at)
        self._journal = journal_of(self.path).open("wb")
        self._journal.write(plan.encode() + b"\n")
        for record in self.records.values():
            self._log(record)

    def _verified(self, line: bytes) -> Record | None:
        try:
            record = Record(**parse_json(line, "the journal"))
            if record.begin != self._at or record.end < record.begin:
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
        if self._journal is None:
            return
        self._journal.write(json.dumps(record.__dict__, ensure_ascii=False).encode() + b"\n")
        self._journal.flush()

    def write(self, name: str, pieces: Iterable[Piece], note: dict[str, Any] | None = None) -> Record:
        """Append one tensor.

        Args:
            name: of the tensor.
            pieces: its bytes.
            note: kept in the journal; the caller may fill it in while it yields the pieces.

        Raises:
            GgpassError: the disk is full or refuses; what is finished stays for the next run.
        """
        with self._explained():
            self._part.seek(self.header_bytes + self._at)
            crc, end = 0, self._at
            for piece in pieces:
                view = memoryview(piece)
                crc, end = crc32c(np.frombuffer(view, np.uint8), crc), end + len(view)
                while view:
                    view = view[self._part.write(view) :]
            record = Record(name, self._at, end, crc, note or {})
            self._log(record)
        self.records[name], self._at = record, end
        return record

    def finish(self, header: bytes) -> None:
        """Write the header, make everything last, open the file once, and give it its name.

        Raises:
            GgpassError: the disk is full or refuses, or what was written does not open; an older file stays then.
        """
        if len(header) != self.header_bytes:
            raise ValueError(f"a header of {len(header)} bytes where {self.header_bytes} are reserved")
        with self._explained():
            self._part.seek(0)
            self._part.write(header)
            os.fsync(self._part.fileno())
            self._check()
            os.replace(self._part_path, self.path)
            sync_directory(self.path.parent)
            self.close()
            if self._resumable:
                journal_of(self.path).unlink(missing_ok=True)

    def _check(self) -> None:
        """Raise GgpassError if the finished part is no safetensors file, or not as long as its tensors."""
        try:
            TensorFile(self._part_path).close()
        except FormatError as error:
            journal_of(self.path).unlink(missing_ok=True)  # nothing may go on from what is damaged
            raise GgpassError(
                f"{self.path} was not replaced: what was written does not open again ({error}); run the same command "
                "again, and report it if it happens twice"
            ) from error

    def close(self) -> None:
        """Stop. Of a run with a plan, what is finished stays under its temporary name for the next run."""
        self._part.close()
        if self._journal is not None:
            self._journal.close()
        if not self._resumable:
            self._part_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _explained(self) -> Any:
        try:
            yield
        except OSError as error:
            rest = "an older file of that name is as it was: make room, or choose another place, and save again"
            if self._resumable:
                rest = (
                    f"the source is as it was, and {self._part_path.name} holds what is finished: make room and run "
                    "the same command again to go on"
                )
            raise GgpassError(f"{self.path} could not be written: {error.strerror or error}; {rest}") from error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
