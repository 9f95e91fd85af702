"""assemble: tensors, each as it is or at its entropy, to one packed file."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ggpass.packed.codec.container import Array, Piece, check_of
from ggpass.packed.codec.native import crc32c
from ggpass.packed.dtypes import DTYPE_BITS
from ggpass.packed.layout import Entry, Source, TensorFile, write_layout
from ggpass.packed.manifest import Manifest, Stored, parse_manifest, seal
from ggpass.packed.writer import Writer

#: The largest offset a header may come to hold, for the room that is reserved before they are known.
_ANY_SIZE = 10**15

Progress = Callable[[str, int, int], None]


def silent(name: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Item:
    """One tensor to store.

    Attributes:
        source: where it comes from.
        encode: returns the manifest's entry, its check still 0, and the coded arrays; None if it stays as it is.
        persistent: as the manifest has it.
    """

    source: Source
    encode: Callable[[], tuple[Stored, Iterator[Array]]] | None = None
    persistent: bool = True

    @property
    def entry(self) -> Entry:
        """Return its name, dtype and shape."""
        return self.source.entry


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
            stored[name] = Stored(**{**record.note, "shape": tuple(record.note["shape"])})
            stored[name] = replace(stored[name], persistent=item.persistent)
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
        writer.finish(seal(write_layout(entries, whole.as_metadata(), room)), _open)


def _open(path: Path) -> None:
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
        else Entry(item.entry.name, "U8", (_ANY_SIZE,), _ANY_SIZE, _ANY_SIZE)
        for item in items
    }
    entries |= {name: Entry(name, "U8", (_ANY_SIZE,), _ANY_SIZE, _ANY_SIZE) for name in kernels}
    whole = replace(manifest, tensors=largest, kernels=dict.fromkeys(kernels, 2**32 - 1))
    return len(write_layout(entries, whole.as_metadata()))


def _write(writer: Writer, item: Item) -> Any:
    entry = item.entry
    if item.encode is None:
        return writer.write(entry.name, [item.source.read().data], Stored("plain", entry.dtype, entry.shape).__dict__)
    stored, arrays = item.encode()
    note: dict[str, Any] = {}

    def pieces() -> Iterator[Piece]:
        checks = []
        for array in arrays:
            checks.append(check_of(array[0]))
            yield from array
        note.update(replace(stored, check=crc32c(np.array(checks, dtype="<u4").view(np.uint8))).__dict__)

    return writer.write(entry.name, pieces(), note)
