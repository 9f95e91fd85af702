"""pack_file, unpack_file: one safetensors file to its packed form and back, a tensor at a time."""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ggpass.errors import FormatError, WeightError
from ggpass.graph.weights import Selection
from ggpass.packed.codec.container import MAX_EXPANSION, Array
from ggpass.packed.dtypes import DTYPE_BITS
from ggpass.packed.layout import Entry, Source, TensorFile, write_layout
from ggpass.packed.manifest import Stored, is_packed
from ggpass.packed.methods import Method
from ggpass.packed.reader import PackedFile
from ggpass.packed.writer import Item, Progress, Writer, assemble, silent

#: Bytes at both ends of a tensor that are compared before it is read as a whole.
_SAMPLE = 1 << 12


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
        """Return bytes of all tensors before."""
        return sum(t.bytes_before for t in self.tensors)

    @property
    def coded_elements(self) -> int:
        """Elements of the tensors that were coded."""
        return sum(t.elements for t in self.tensors if t.kind != "plain")

    @property
    def payload_bits(self) -> float:
        """Return bits a weight of what was coded; 0 where nothing was."""
        coded = sum(t.bytes_after for t in self.tensors if t.kind != "plain")
        return 8 * coded / self.coded_elements if self.coded_elements else 0.0

    @property
    def file_bits(self) -> float:
        """Return bits an element of the whole file; 0 for an empty one."""
        count = sum(t.elements for t in self.tensors)
        return 8 * self.file_bytes / count if count else 0.0


def find_aliases(file: TensorFile) -> dict[str, str]:
    """Return alias -> the first tensor of the same dtype, shape and bytes.

    Each tensor is compared with one other at most, however many look alike at both ends.
    """
    alike: dict[tuple[object, ...], list[str]] = {}
    for name, entry in file.layout.entries.items():
        if entry.nbytes:
            ends = file.read(name, 0, min(entry.nbytes, _SAMPLE)), file.read(name, max(0, entry.nbytes - _SAMPLE))
            alike.setdefault((entry.dtype, entry.shape, *(part.tobytes() for part in ends)), []).append(name)
    aliases: dict[str, str] = {}
    for names in alike.values():
        first: dict[int, str] = {}
        for name in names if len(names) > 1 else ():
            other = first.setdefault(file.checksum(name), name)
            if other != name and all(map(np.array_equal, file.blocks(name), file.blocks(other))):
                aliases[name] = other
    return aliases


def pack_file(
    source: Path,
    target: Path,
    work: Path,
    method: Method,
    *,
    only: tuple[str, ...] = (),
    skip: tuple[str, ...] = (),
    threads: int = 1,
    progress: Progress = silent,
) -> PackReport:
    """Pack one file: the tensors that the method takes become payloads, the others stay as they are.

    1. The source is untouched, and `target` does not exist or is whole.
    2. One tensor is in memory at a time, most of them in blocks.
    3. The same call goes on if one was interrupted with this source's content.
    4. Equal tensors are stored once.

    Args:
        source: a safetensors file.
        target, work: where to write, in a Staging.
        method, only, skip, threads, progress: as `pack` takes them.

    Raises:
        FormatError: the source is damaged or already packed.
        WeightError: a tensor cannot be held this way; the message names it.
        OSError: the disk is full or refuses.
    """
    with TensorFile(source) as file:
        if is_packed(file.layout):
            raise FormatError(f"{source} is packed already; `ggpass unpack` it first")
        aliases, selection, items = find_aliases(file), Selection(only, skip), []
        reasons: dict[str, str] = {}  # why a tensor stays as it is, or ''
        for name, entry in file.layout.entries.items():
            reasons[name] = selection.reason([name]) or method.reason_to_leave(entry)
            if name not in aliases:
                part = Source(entry, functools.partial(file.read, name))
                encode = None if reasons[name] else functools.partial(_encode, part, method, threads)
                items.append(Item(entry, part.read, encode))
        assemble(
            target,
            work,
            items,
            aliases=aliases,
            metadata=file.layout.metadata,
            plan=json.dumps(["pack 2", file.fingerprint(), method.name, only, skip]),
            progress=progress,
        )
        with PackedFile(target) as packed:
            return _report(file, packed, method, reasons)


def _encode(source: Source, method: Method, threads: int) -> tuple[Stored, Iterator[Array]]:
    try:
        return method.encode(source, threads)
    except FormatError as error:
        name = source.entry.name
        raise WeightError(f"{name} cannot be packed: {error}; or leave it out with --skip {name}") from error


def _report(file: TensorFile, packed: PackedFile, method: Method, reasons: dict[str, str]) -> PackReport:
    """Return what packing did, read off the two files: an earlier run may have done a part of it."""
    found = []
    for name, reason in reasons.items():
        entry, other = file.layout.entries[name], packed.manifest.aliases.get(name)
        kind = "alias" if other else "plain" if reason else method.name.split()[0]
        reason = f"equals {other}" if other else reason
        found.append(Packed(name, kind, entry.size, entry.nbytes, packed.packed_bytes(name), reason))
    return PackReport(tuple(found), packed.size)


def unpack_file(source: Path, target: Path, work: Path, *, threads: int = 1, progress: Progress = silent) -> None:
    """Unpack one file: every tensor of the state_dict, decoded in its original dtype, as plain safetensors.

    Args:
        source: a packed file.
        target, work: where to write, in a Staging.
        threads, progress: as `unpack` takes them.

    Raises:
        FormatError: the source is damaged, or so small that what it claims to hold cannot be a model; the message
            names the tensor.
        OSError: the disk is full or refuses.
    """
    with PackedFile(source) as packed:
        ordered = sorted(
            (Entry(name, packed.stored(name).dtype, packed.stored(name).shape) for name in packed.state_names),
            key=lambda entry: -DTYPE_BITS[entry.dtype],
        )
        total = sum(entry.nbytes for entry in ordered)
        # Each name of a tied tensor is written out in full, so that a few bytes could ask for any amount.
        if total > 8 * MAX_EXPANSION * packed.size:
            raise FormatError(
                f"{source} of {packed.size} bytes would unpack to {total}, more than a model's weights come to; do not "
                "trust it, or read its tensors one by one with ggpass.file.PackedFile"
            )
        entries: dict[str, Entry] = {}
        at = 0
        for entry in ordered:
            entries[entry.name] = replace(entry, begin=at, end=at + entry.nbytes)
            at += entry.nbytes
        header = write_layout(entries, packed.manifest.metadata)
        with Writer(target, work, len(header), f"unpack {packed.fingerprint}") as writer:
            if writer.finished:
                return
            for entry in ordered:
                progress(entry.name, entries[entry.name].begin, total)
                if entry.name not in writer.records:
                    writer.write(entry.name, [packed.read_bytes(entry.name, threads=threads).data])
            progress("", total, total)
            writer.finish(header)
