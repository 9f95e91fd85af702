"""Σ(w' − w)² / Σw², ν, σ and bits of each reshaped weight, before and after."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ggpass.ggd.density import GGD
from ggpass.ggd.fit import fit_moments
from ggpass.ggd.grid import Histogram
from ggpass.passes.deepshape.histogram import count

#: Elements whose squares are summed at a time.
BLOCK_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Shaped:
    """What became of one weight.

    Attributes:
        name, size: of the weight.
        before, after: its moment fits.
        bits_before, bits_after: zero-order entropy of round(w / Δ), in bits a weight.
        energy: Σw².
        error: Σ(w' − w)².
        product: Σ w·w'.
        moved: how many weights were remapped; the others are rarer values.
    """

    name: str
    size: int
    before: GGD
    after: GGD
    bits_before: float
    bits_after: float
    energy: float
    error: float
    product: float
    moved: int

    @property
    def change(self) -> float:
        """Σ(w' − w)² / Σw²."""
        return self.error / self.energy

    @property
    def change_of_scale(self) -> float:
        """(1 − b)² with b = Σw·w' / Σw²: the part of `change` that multiplying all weights by b makes."""
        return (1 - self.product / self.energy) ** 2


@dataclass(frozen=True)
class Reshaped:
    """What became of all weights; the sums behave like those of one `Shaped`.

    Attributes:
        shaped: the reshaped weights.
        skipped: (name, reason) of those that stay as they are.
        pooled_before, pooled_after: entropy in bits a weight if all reshaped weights share one code.
    """

    shaped: tuple[Shaped, ...]
    skipped: tuple[tuple[str, str], ...]
    pooled_before: float
    pooled_after: float

    @property
    def size(self) -> int:
        """Elements that were reshaped, values that stay included."""
        return sum(s.size for s in self.shaped)

    def mean(self, what: Callable[[Shaped], float]) -> float:
        """Σ size·what / Σ size; NaN where nothing was reshaped."""
        return sum(s.size * what(s) for s in self.shaped) / self.size if self.shaped else math.nan

    @property
    def change(self) -> float:
        """ΣΣ(w' − w)² / ΣΣw² over all reshaped weights."""
        return sum(s.error for s in self.shaped) / sum(s.energy for s in self.shaped) if self.shaped else math.nan

    @property
    def change_of_scale(self) -> float:
        """(1 − b)², b = ΣΣw·w' / ΣΣw²."""
        if not self.shaped:
            return math.nan
        return (1 - sum(s.product for s in self.shaped) / sum(s.energy for s in self.shaped)) ** 2

    @property
    def moved_share(self) -> float:
        """The share of the reshaped weights' values that were remapped; the others are rare."""
        return sum(s.moved for s in self.shaped) / self.size if self.shaped else math.nan


def measure(name: str, old: Tensor, new: Tensor, moved: int, step: float) -> tuple[Shaped, list[Histogram]]:
    """The figures of one weight, and its histograms before and after; sums in float64, a block at a time.

    Args:
        name: of the weight.
        old, new: any shape, the same for both.
        moved: how many of them were remapped.
        step: Δ.
    """
    energy = error = product = 0.0
    for a, b in zip(old.reshape(-1).split(BLOCK_ELEMENTS), new.reshape(-1).split(BLOCK_ELEMENTS)):
        a, b = a.double(), b.double()
        energy += float(a.square().sum())
        error += float((b - a).square().sum())
        product += float((a * b).sum())
    before, after = (count(w.reshape(1, -1), step) for w in (old, new))
    shaped = Shaped(
        name,
        old.numel(),
        before=fit_moments(old),
        after=fit_moments(new),
        bits_before=before.bits,
        bits_after=after.bits,
        energy=energy,
        error=error,
        product=product,
        moved=moved,
    )
    return shaped, [before, after]


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
