"""Writer: a safetensors file, written tensor by tensor with room for the header at its front, and opened at the end.

Beside the unfinished file lies a journal: one JSON line with the plan, then one for each tensor that is finished. After
a kill the same plan goes on behind the last tensor whose bytes still have the checksum that its line states.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ggpass.errors import FormatError, GgpassError
from ggpass.packed.codec.container import Piece
from ggpass.packed.codec.native import crc32c
from ggpass.packed.layout import TensorFile
from ggpass.packed.strict_json import parse_json

_VERIFY_BYTES = 1 << 24


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


def open_tensors(path: Path) -> None:
    """Raise FormatError if a file is no safetensors file, or not as long as its tensors."""
    TensorFile(path).close()


def _open(path: Path) -> BinaryIO:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    return os.fdopen(fd, "r+b", buffering=0)


class Writer:
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

    def finish(self, header: bytes, check: Callable[[Path], object] = open_tensors) -> None:
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

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exception: object) -> None:
        self._part.close()
        self._journal.close()
