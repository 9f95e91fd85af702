"""measure: what a packed file's payloads cost, against the entropy of their own symbols."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggpass.packed.boundary import reading
from ggpass.packed.codec.histogram import histogram
from ggpass.packed.reader import PackedFile


@dataclass(frozen=True)
class Measured:
    """One tensor of a packed file.

    Attributes:
        name, kind: kind is the format's name for codes.
        elements: of the tensor that comes back.
        bytes: of its payload.
        entropy_bytes: Σ n·H / 8 over its coded arrays: what an ideal coder that knew each histogram would need.
    """

    name: str
    kind: str
    elements: int
    bytes: int
    entropy_bytes: float

    @property
    def bits(self) -> float:
        """Bits an element."""
        return 8 * self.bytes / self.elements if self.elements else 0.0

    @property
    def entropy(self) -> float:
        """Bits an element at the entropy of zero order."""
        return 8 * self.entropy_bytes / self.elements if self.elements else 0.0

    @property
    def efficiency(self) -> float:
        """entropy / bits, tables, checksums and scales included; 1 for nothing."""
        return self.entropy_bytes / self.bytes if self.bytes else 1.0


@dataclass(frozen=True)
class PackedInspection:
    """What `ggpass inspect` shows of packed files.

    Attributes:
        coded, plain: the tensors, by what became of them.
        aliases: names that stand for a stored tensor.
        file_bytes: of the files, headers included.
    """

    coded: tuple[Measured, ...]
    plain: tuple[Measured, ...]
    aliases: dict[str, str]
    file_bytes: int

    @property
    def elements(self) -> int:
        """Elements of all stored tensors."""
        return sum(t.elements for t in (*self.coded, *self.plain))

    @property
    def total(self) -> Measured:
        """All coded tensors as one."""
        return Measured(
            "total",
            "",
            sum(t.elements for t in self.coded),
            sum(t.bytes for t in self.coded),
            sum(t.entropy_bytes for t in self.coded),
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""

        def row(t: Measured) -> dict[str, Any]:
            return {**asdict(t), "bits": t.bits, "entropy": t.entropy, "efficiency": t.efficiency}

        return {
            "file_bytes": self.file_bytes,
            "elements": self.elements,
            "total": row(self.total),
            "coded": [row(t) for t in self.coded],
            "plain": [row(t) for t in self.plain],
            "aliases": self.aliases,
        }


def measure(files: Iterable[Path], progress: Callable[[str], None] = lambda name: None) -> PackedInspection:
    """Decode every payload's symbols and compare its bytes with their entropy.

    Raises:
        FormatError: a damaged file; the message names the tensor.
    """
    coded: list[Measured] = []
    plain: list[Measured] = []
    aliases: dict[str, str] = {}
    size = 0
    for path in files:
        size += path.stat().st_size
        with PackedFile(path) as opened:
            aliases |= opened.manifest.aliases
            for name, stored in opened.manifest.tensors.items():
                progress(name)
                count, packed = math.prod(stored.shape), opened.packed_bytes(name)
                payload = opened.payload(name)
                if stored.kind == "plain":
                    plain.append(Measured(name, "plain", count, packed, packed))
                    continue
                with reading(path, name):
                    bits = sum(histogram(array.decode()).entropy * array.count for array in payload.arrays)
                coded.append(Measured(name, stored.format or stored.kind, count, packed, bits / 8))
    return PackedInspection(tuple(coded), tuple(plain), aliases, size)
