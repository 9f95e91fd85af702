"""8·bytes / n against H = −Σ p log2 p: what a weight that is stored as symbols costs, in a packed or an ONNX file."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any


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
        """The number of elements."""
        return math.prod(self.shape)

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

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        derived = ("elements", "bits", "entropy", "efficiency")
        return asdict(self) | {name: getattr(self, name) for name in derived}


def total(weights: Iterable[StoredWeight]) -> StoredWeight:
    """Return all weights as one."""
    weights = tuple(weights)
    count, size = sum(w.elements for w in weights), sum(w.bytes for w in weights)
    return StoredWeight("total", "", (count,), size, sum(w.entropy_bytes for w in weights))
