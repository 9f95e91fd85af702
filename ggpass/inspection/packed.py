"""8·bytes / n against H = −Σ p log2 p: what a weight that is stored as symbols costs, in a packed or an ONNX file."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggpass.packed.codec.model import histogram
from ggpass.packed.reader import PackedFile
from ggpass.packed.untrusted import reading


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of a file.

    Attributes:
        name, kind: kind is the format's name for codes.
        shape: of the tensor that comes back.
        bytes: as stored.
        entropy_bytes: Σ n·H / 8 over its coded arrays: the need of an ideal coder that knows each histogram.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bytes: int
    entropy_bytes: float

    @property
    def elements(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Return bits an element."""
        return 8 * self.bytes / self.elements if self.elements else 0.0

    @property
    def entropy(self) -> float:
        """Return bits an element at the entropy of zero order."""
        return 8 * self.entropy_bytes / self.elements if self.elements else 0.0

    @property
    def efficiency(self) -> float:
        """entropy / bits, tables, checksums and scales included; 1 for nothing."""
        return self.entropy_bytes / self.bytes if self.bytes else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        derived = ("elements", "bits", "entropy", "efficiency")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def total(weights: Iterable[StoredWeight]) -> StoredWeight:
    """Return all weights as one."""
    weights = tuple(weights)
    count, size = sum(w.elements for w in weights), sum(w.bytes for w in weights)
    return StoredWeight("total", "", (count,), size, sum(w.entropy_bytes for w in weights))


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
        """Return all coded tensors as one."""
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
