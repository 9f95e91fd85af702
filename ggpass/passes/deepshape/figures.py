"""Σ(w' − w)² / Σw², ν, σ and bits of each reshaped weight, before and after."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ggpass.ggd.blocks import blocks
from ggpass.ggd.density import GGD
from ggpass.ggd.fit import fit_moments
from ggpass.ggd.grid import Histogram
from ggpass.passes.deepshape.histogram import count


@dataclass(frozen=True)
class Sums:
    """What is summed over a weight w that became w', or over several.

    Attributes:
        size: of the weights.
        energy: Σw².
        error: Σ(w' − w)².
        product: Σ w·w'.
        moved: how many weights were remapped; the others are rarer values.
    """

    size: int
    energy: float
    error: float
    product: float
    moved: int

    @property
    def change(self) -> float:
        """Σ(w' − w)² / Σw²; NaN for no weights."""
        return self.error / self.energy if self.energy else math.nan

    @property
    def change_of_scale(self) -> float:
        """(1 − b)² with b = Σw·w' / Σw²: the part of `change` that multiplying all weights by b makes."""
        return (1 - self.product / self.energy) ** 2 if self.energy else math.nan

    @property
    def moved_share(self) -> float:
        """Return the share of the weights that were remapped; NaN for no weights."""
        return self.moved / self.size if self.size else math.nan


@dataclass(frozen=True)
class Shaped(Sums):
    """What became of one weight.

    Attributes:
        name: of the weight.
        before, after: its moment fits.
        bits_before, bits_after: zero-order entropy of round(w / Δ), in bits a weight.
    """

    name: str
    before: GGD
    after: GGD
    bits_before: float
    bits_after: float


@dataclass(frozen=True)
class Reshaped(Sums):
    """What became of all weights.

    Attributes:
        shaped: the reshaped weights.
        skipped: (name, reason) of those that stay as they are.
        pooled_before, pooled_after: entropy in bits a weight if all reshaped weights share one code.
    """

    shaped: tuple[Shaped, ...]
    skipped: tuple[tuple[str, str], ...]
    pooled_before: float
    pooled_after: float

    @classmethod
    def of(
        cls, shaped: Sequence[Shaped], skipped: Sequence[tuple[str, str]], pooled: Sequence[Histogram]
    ) -> "Reshaped":
        """Sum over the weights; `pooled` are the histograms of all before and after, none without a weight."""
        sums: dict[str, Any] = {each.name: sum(getattr(s, each.name) for s in shaped) for each in fields(Sums)}
        before, after = (h.bits for h in pooled) if pooled else (math.nan, math.nan)
        return cls(**sums, shaped=tuple(shaped), skipped=tuple(skipped), pooled_before=before, pooled_after=after)

    def mean(self, what: Callable[[Shaped], float]) -> float:
        """Σ size·what / Σ size; NaN if nothing was reshaped."""
        return sum(s.size * what(s) for s in self.shaped) / self.size if self.shaped else math.nan


def measure(name: str, old: Tensor, new: Tensor, moved: int, step: float) -> tuple[Shaped, list[Histogram]]:
    """Return the figures of one weight, and its histograms before and after; sums in float64, a block at a time.

    Args:
        name: of the weight.
        old, new: any shape, the same for both.
        moved: how many of them were remapped.
        step: Δ.
    """
    energy = error = product = 0.0
    for a, b in zip(blocks(old.contiguous()), blocks(new.contiguous())):
        a, b = a.double(), b.double()
        energy += float(a.square().sum())
        error += float((b - a).square().sum())
        product += float((a * b).sum())
    before, after = (count(w.reshape(1, -1), step) for w in (old, new))
    sums, fits = (old.numel(), energy, error, product, moved), (fit_moments(old), fit_moments(new))
    return Shaped(*sums, name, *fits, before.bits, after.bits), [before, after]


def in_words(shaped: Shaped) -> str:
    """What happened to one weight, in one line."""
    rest = shaped.change - shaped.change_of_scale
    return (
        f"ν {shaped.before.shape:.2f} → {shaped.after.shape:.2f}, σ {shaped.before.std:.3g} → {shaped.after.std:.3g}, "
        f"{shaped.bits_before:.2f} → {shaped.bits_after:.2f} bit, change {shaped.change:.1%} ({rest:.1%} beside scale)"
    )


def summary(reshaped: Reshaped, step: float) -> str:
    """What happened to all weights together, in one line."""
    if not reshaped.shaped:
        return "nothing was reshaped"
    rest = reshaped.change - reshaped.change_of_scale
    before, after = (reshaped.mean(lambda s: s.bits_before), reshaped.mean(lambda s: s.bits_after))
    pooled = reshaped.pooled_after - reshaped.pooled_before
    return (
        f"{reshaped.size} weights by {step:.3g}: {before:.3f} → {after:.3f} bits each ({after - before:+.3f}), "
        f"{pooled:+.3f} where all share one code; relative squared change {reshaped.change:.2%}, {rest:.2%} beside "
        f"the scale; {1 - reshaped.moved_share:.2%} are rare values and stay"
    )
