"""Candidate, Use: a weight that may be drawn, what each place does with it, and which place decides."""

from dataclasses import dataclass, replace
from enum import Enum

from torch import Tensor

from ggpass.graph.weights import Weight


class Group(Enum):
    """Operators whose weights are compared with each other: for siblings and for ν."""

    LINEAR = "linear"
    CONV = "conv"
    EMBEDDING = "embedding"


@dataclass(frozen=True)
class Use:
    """One place that computes with a weight.

    Attributes:
        operator: `linear`, `conv2d`, `embedding`, …
        group: its kind.
        fan: n, the terms in one element of the result; for an embedding 1.
        declared: (fan_in, fan_out) as `torch.nn.init` counts them from the shape: what the model's own initializer saw.
        gain: ξ.
        why: where ξ comes from, in words.
        padding: the row of an embedding that stays as it is; None where there is none.
    """

    operator: str
    group: Group
    fan: float
    declared: tuple[float, float]
    gain: float = 1.0
    why: str = "no graph was read"
    padding: int | None = None

    @property
    def variance(self) -> float:
        """ξ/n."""
        return self.gain / self.fan


@dataclass(frozen=True)
class Candidate:
    """One weight of a model, and what is to be known to draw it.

    Attributes:
        weight: with all its names.
        uses: the places that compute with it; none if `reason` says why it is left alone.
        reason: the reason why it stays as it is, or ''.
    """

    weight: Weight
    uses: tuple[Use, ...] = ()
    reason: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Return every name of it, sorted."""
        return tuple(sorted(self.weight.names))

    @property
    def name(self) -> str:
        """Return the first of the sorted names, which seeds it."""
        return self.names[0]

    @property
    def tensor(self) -> Tensor:
        """Return the weight itself."""
        return self.weight.tensor

    def decide(self) -> Use:
        """Return the use that sets the scale.

        1. An embedding wins over everything: the rest of the model is made for the size of its rows (a tied head
           reads what the table gave).
        2. Else the use with the least ξ/n: no way through the model then grows; the words name the others.
        """
        tables = [use for use in self.uses if use.group is Group.EMBEDDING]
        chosen = tables[0] if tables else min(self.uses, key=lambda use: use.variance)
        padding = next((use.padding for use in tables if use.padding is not None), None)
        others = [use for use in self.uses if use is not chosen]
        if tables and len(tables) < len(self.uses):
            kinds = ", ".join(dict.fromkeys(u.operator for u in self.uses if u.group is not Group.EMBEDDING))
            return replace(chosen, why=f"tied with a {kinds}: the embedding's rule", padding=padding)
        if any(use.variance > chosen.variance * (1 + 1e-9) for use in others):
            return replace(chosen, why=f"{chosen.why}; the least of {len(self.uses)} uses", padding=padding)
        return replace(chosen, padding=padding)
