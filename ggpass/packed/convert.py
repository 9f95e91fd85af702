"""pack_file, unpack_file: one safetensors file to its packed form and back, a tensor at a time."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ggpass.errors import FormatError, WeightError
from ggpass.graph.weights import matches
from ggpass.packed.checkpoint import DTYPE_BITS
from ggpass.packed.codec import crc32c
from ggpass.packed.codec.container import Piece, check_of
from ggpass.packed.layout import Entry, TensorFile, write_layout
from ggpass.packed.manifest import Manifest, Stored, is_packed, seal
from ggpass.packed.methods import Array, Method, Source
from ggpass.packed.reader import PackedFile
from ggpass.packed.writer import Writer

#: The largest offset a header may come to hold, for the room that is reserved before they are known.
_ANY_SIZE = 10**15

#: Bytes compared to find equal tensors before they are read as a whole.
_SAMPLE = 1 << 12

Progress = Callable[[str, int, int], None]


def silent(name: str, done: int, total: int) -> None:
    """No progress bar."""


@dataclass(frozen=True)
class Packed:
    """What became of one tensor.

    Attributes:
        name, kind, elements: of the tensor; kind `alias` where an equal one is stored.
        bytes_before, bytes_after: in the source's file and in the packed one.
        reason: why it stayed as it is; empty where it did not.
    """

    name: str
    kind: str
    elements: int
    bytes_before: int
    bytes_after: int
    reason: str = ""


@dataclass(frozen=True)
class PackReport:
    """What `pack` did.

    Attributes:
        tensors: one entry each.
        file_bytes: of the packed files, headers included.
        notes: files that were left out, and why.
    """

    tensors: tuple[Packed, ...]
    file_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def source_bytes(self) -> int:
        """Bytes of all tensors before."""
        return sum(t.bytes_before for t in self.tensors)

    @property
    def coded_elements(self) -> int:
        """Elements of the tensors that were coded."""
        return sum(t.elements for t in self.tensors if t.kind != "plain")

    @property
    def payload_bits(self) -> float:
        """Bits a weight of what was coded; 0 where nothing was."""
        coded = sum(t.bytes_after for t in self.tensors if t.kind != "plain")
        return 8 * coded / self.coded_elements if self.coded_elements else 0.0

    @property
    def file_bits(self) -> float:
        """Bits an element of the whole file; 0 for an empty one."""
        count = sum(t.elements for t in self.tensors)
        return 8 * self.file_bytes / count if count else 0.0


@dataclass(frozen=True)
class _Tensor(Source):
    """A tensor of the source, and what is to become of it."""

    entry: Entry
    file: TensorFile = field(repr=False)
    method: Method | None = None
    reason: str = ""

    def read(self, begin: int = 0, end: int | None = None) -> np.ndarray:
        return self.file.read(self.entry.name, begin, end)


def find_aliases(file: TensorFile) -> dict[str, str]:
    """alias -> the first tensor of the same dtype, shape and bytes; a sample decides which ones are compared whole."""
    seen: dict[tuple[object, ...], list[str]] = {}
    aliases: dict[str, str] = {}
    for name, entry in file.layout.entries.items():
        if not entry.nbytes:
            continue
        sample = file.read(name, 0, min(entry.nbytes, _SAMPLE)), file.read(name, max(0, entry.nbytes - _SAMPLE))
        candidates = seen.setdefault((entry.dtype, entry.shape, *(part.tobytes() for part in sample)), [])
        for other in candidates:
            if _equal(file, name, other, entry.nbytes):
                aliases[name] = other
                break
        else:
            candidates.append(name)
    return aliases


def _equal(file: TensorFile, a: str, b: str, nbytes: int) -> bool:
    block = 1 << 22
    starts = range(0, nbytes, block)
    ends = [min(nbytes, start + block) for start in starts]
    return all(np.array_equal(file.read(a, s, e), file.read(b, s, e)) for s, e in zip(starts, ends))


def _plan(file: TensorFile, method: Method, only: tuple[str, ...], skip: tuple[str, ...]) -> list[_Tensor]:
    """Every tensor with its method; those that stay come first, the widest elements ahead, so that all lie aligned."""
    plan = []
    for name, entry in file.layout.entries.items():
        reason = method.reason_to_leave(entry)
        if any(matches(name, pattern) for pattern in skip):
            reason = "is skipped by name"
        elif only and not any(matches(name, pattern) for pattern in only):
            reason = "matches none of the names to pack"
        plan.append(_Tensor(entry, file, None if reason else method, reason))
    return sorted(plan, key=lambda tensor: (tensor.method is not None, -DTYPE_BITS[tensor.entry.dtype]))


def check_patterns(names: Iterable[str], only: tuple[str, ...], skip: tuple[str, ...]) -> None:
    """Raise WeightError where a pattern matches no tensor: a typo would go unseen."""
    known = list(names)
    for pattern in (*only, *skip):
        if not any(matches(name, pattern) for name in known):
            raise WeightError(f"{pattern!r} matches no tensor; they are {', '.join(known[:5])}, …")


def _room(plan: list[_Tensor], manifest: Manifest) -> int:
    """Bytes that the header cannot exceed: the one it would be with the largest numbers everywhere."""
    entries, tensors = {}, {}
    for tensor in plan:
        entry = tensor.entry
        worst = Stored("codes", entry.dtype, entry.shape, 2**32 - 1, "x" * 24, "0" * 16)
        tensors[entry.name] = worst
        shape = entry.shape if tensor.method is None else (_ANY_SIZE,)
        entries[entry.name] = Entry(entry.name, entry.dtype, shape, _ANY_SIZE, _ANY_SIZE)
    worst_case = replace(manifest, tensors=tensors)
    return len(write_layout(entries, worst_case.as_metadata()))


def _payload(arrays: Iterator[Array], checks: list[int]) -> Iterator[Piece]:
    """The pieces of all arrays; their header checksums are collected on the way."""
    for array in arrays:
        checks.append(check_of(array[0]))
        yield from array


def pack_file(
    source: Path,
    target: Path,
    method: Method,
    *,
    only: tuple[str, ...] = (),
    skip: tuple[str, ...] = (),
    threads: int = 1,
    progress: Progress = silent,
) -> PackReport:
    """Pack one file: the tensors that the method takes become payloads, the others stay as they are.

    1. At any time the source is untouched, and `target` does not exist or is whole.
    2. One tensor is in memory at a time, most of them in blocks.
    3. The same call goes on where an interrupted one stopped.
    4. Equal tensors are stored once.

    Raises:
        FormatError: the source is damaged or already packed.
        WeightError: a tensor cannot be held this way; the message names it.
        GgpassError: `target` cannot be written.
    """
    with TensorFile(source) as file:
        if is_packed(file.layout):
            raise FormatError(f"{source} is packed already; `ggpass unpack` it first")
        aliases = find_aliases(file)
        plan = [t for t in _plan(file, method, only, skip) if t.entry.name not in aliases]
        manifest = Manifest({}, aliases, dict(file.layout.metadata))
        room = _room(plan, manifest)
        total = sum(tensor.entry.nbytes for tensor in plan)
        with Writer(target, room, _fingerprint(file, method, only, skip)) as writer:
            entries: dict[str, Entry] = {}
            stored: dict[str, Stored] = {}
            done = 0
            for tensor in plan:
                name = tensor.entry.name
                progress(name, done, total)
                if name not in writer.records:
                    _write(writer, tensor, threads)
                record = writer.records[name]
                stored[name] = Stored(**{**record.note, "shape": tuple(record.note["shape"])})
                entries[name] = _entry_of(tensor, record.begin, record.end)
                done += tensor.entry.nbytes
            progress("", total, total)
            in_order = {name: stored[name] for name in file.layout.entries if name in stored}
            header = write_layout(entries, replace(manifest, tensors=in_order).as_metadata(), room)
            writer.finish(seal(header))
    return report_of(source, target, method, only=only, skip=skip)


def _write(writer: Writer, tensor: _Tensor, threads: int) -> None:
    entry, note = tensor.entry, dict[str, Any]()
    checks: list[int] = []
    if tensor.method is None:
        data = tensor.read()
        stored = Stored("plain", entry.dtype, entry.shape, crc32c(data))
        writer.write(entry.name, [data.data], stored.__dict__)
        return
    try:
        stored, arrays = tensor.method.encode(tensor, threads)
    except FormatError as error:
        raise WeightError(
            f"{entry.name} cannot be packed: {error}; or leave it out with --skip {entry.name}"
        ) from error

    def pieces() -> Iterator[Piece]:
        yield from _payload(arrays, checks)
        check = crc32c(np.array(checks, dtype="<u4").view(np.uint8))
        note.update(replace(stored, check=check).__dict__)

    writer.write(entry.name, pieces(), note)


def _entry_of(tensor: _Tensor, begin: int, end: int) -> Entry:
    if tensor.method is None:
        return replace(tensor.entry, begin=begin, end=end)
    return Entry(tensor.entry.name, "U8", (end - begin,), begin, end)


def _fingerprint(file: TensorFile, method: Method, only: tuple[str, ...], skip: tuple[str, ...]) -> str:
    """What a run does, in one line: only an equal one may go on with what it left."""
    stat = file.path.stat()
    header = crc32c(np.frombuffer(file.layout.raw, np.uint8))
    return json.dumps(["ggpass 1", stat.st_size, stat.st_mtime_ns, header, method.name, only, skip])


def report_of(
    source: Path, target: Path, method: Method, *, only: tuple[str, ...] = (), skip: tuple[str, ...] = ()
) -> PackReport:
    """What packing `source` into `target` did, read off the two files."""
    with TensorFile(source) as file, PackedFile(target) as packed:
        found = []
        for tensor in _plan(file, method, only, skip):
            entry, other = tensor.entry, packed.manifest.aliases.get(tensor.entry.name)
            kind = "alias" if other else method.name.split()[0] if tensor.method else "plain"
            reason = f"equals {other}" if other else tensor.reason
            after = packed.packed_bytes(entry.name)
            found.append(Packed(entry.name, kind, entry.size, entry.nbytes, after, reason))
        return PackReport(tuple(found), target.stat().st_size)


def unpack_file(source: Path, target: Path, *, threads: int = 1, progress: Progress = silent) -> None:
    """Unpack one file: every tensor decoded in its original dtype, as plain safetensors.

    Raises:
        FormatError: the source is damaged; the message names the tensor.
        GgpassError: `target` cannot be written.
    """
    with PackedFile(source) as packed:
        entries: dict[str, Entry] = {}
        for name in packed.names:
            stored = packed.stored(name)
            entries[name] = Entry(name, stored.dtype, stored.shape)
        ordered = sorted(entries.values(), key=lambda entry: -DTYPE_BITS[entry.dtype])
        at, total = 0, sum(entry.nbytes for entry in ordered)
        for entry in ordered:
            entries[entry.name] = replace(entry, begin=at, end=at + entry.nbytes)
            at += entry.nbytes
        header = write_layout(entries, packed.manifest.metadata)
        with Writer(target, len(header), f"unpack {packed.fingerprint}") as writer:
            for entry in ordered:
                progress(entry.name, entries[entry.name].begin, total)
                if entry.name not in writer.records:
                    data = packed.read_bytes(entry.name, threads=threads)
                    writer.write(entry.name, [data.data])
            progress("", total, total)
            writer.finish(header)
