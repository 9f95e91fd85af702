"""measure: the cost of a packed file's payloads, against the entropy of their own symbols."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggpass.inspection.coded import StoredWeight, total
from ggpass.packed.boundary import reading
from ggpass.packed.codec.histogram import histogram
from ggpass.packed.reader import PackedFile


@dataclass(frozen=True)
class PackedInspection:
    """What `ggpass inspect` shows of packed files.

    Attributes:
        coded, plain: the tensors that are stored as symbols, and as they are.
        aliases: names that stand for a stored tensor.
        file_bytes: of the files, headers included.
    """

    coded: tuple[StoredWeight, ...]
    plain: tuple[StoredWeight, ...]
    aliases: dict[str, str]
    file_bytes: int

    @property
    def elements(self) -> int:
        """Elements of all stored tensors."""
        return sum(t.elements for t in (*self.coded, *self.plain))

    @property
    def total(self) -> StoredWeight:
        """All coded tensors as one."""
        return total(self.coded)

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "file_bytes": self.file_bytes,
            "elements": self.elements,
            "total": self.total.as_dict(),
            "coded": [t.as_dict() for t in self.coded],
            "plain": [t.as_dict() for t in self.plain],
            "aliases": self.aliases,
        }


def measure(files: Iterable[Path], progress: Callable[[str], None] = lambda name: None) -> PackedInspection:
    """Decode every payload's symbols and compare its bytes with their entropy.

    Raises:
        FormatError: a damaged file; the message names the tensor.
    """
    coded: list[StoredWeight] = []
    plain: list[StoredWeight] = []
    aliases: dict[str, str] = {}
    size = 0
    for path in files:
        size += path.stat().st_size
        with PackedFile(path) as opened:
            aliases |= opened.manifest.aliases
            for name, stored in opened.manifest.tensors.items():
                progress(name)
                packed = opened.packed_bytes(name)
                payload = opened.payload(name)
                if stored.kind == "plain":
                    plain.append(StoredWeight(name, "plain", stored.shape, packed, packed))
                    continue
                with reading(path, name):
                    bits = sum(histogram(array.decode()).bits * array.count for array in payload.arrays)
                coded.append(StoredWeight(name, stored.format or stored.kind, stored.shape, packed, bits / 8))
    return PackedInspection(tuple(coded), tuple(plain), aliases, size)
