"""T(w) = Q'(p(w)), w' = Δ·round(T(w) / Δ): histogram specification onto a generalized Gaussian."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ggpass.errors import FormatError
from ggpass.ggd.grid import Histogram, on_grid, symbols_of
from ggpass.ggd.moments import Moments
from ggpass.ggd.quantile import quantile
from ggpass.passes.deepshape.histogram import BLOCK_ELEMENTS

#: A row needs this many elements: the moment fit's ν is good to about a fifth then.
MIN_ELEMENTS = 32

#: A deviation of so many steps or more is left 0.5 % of noise by the grid (Δ²/12 against 16Δ²).
MIN_STEPS = 4.0

#: Below this ν a few outliers decide the moments, and 0.8ν would make more of them: at ν = 0.5 the published ratios
#: double the deviation, at ν = 0.1 they multiply it by thousands.
MIN_SHAPE = 0.5


@dataclass(frozen=True)
class Shaping:
    """ν' = shape_ratio·ν, α' = scale_ratio·α, on a grid of Δ = step.

    Attributes:
        mode: `paper`, or `compensated`: the remapped values multiplied so that their Σw² is that of before.
        granularity: what has one fit and one map: all weights together, each weight, or each output channel.
        shape_ratio, scale_ratio: of the target to the fit; `compensated` sets the scale itself.
        step: Δ.
        rare: values with fewer occurrences stay, counted in all weights together; a smaller population (a tensor, a
            channel) has that number in proportion to its size.

    Raises:
        FormatError: a value that is none of these.
    """

    mode: Literal["paper", "compensated"] = "paper"
    granularity: Literal["model", "tensor", "channel"] = "model"
    shape_ratio: float = 0.8
    scale_ratio: float = 0.6
    step: float = 2.0**-13
    rare: float = 1000

    def __post_init__(self) -> None:
        for name, known in (("mode", ("paper", "compensated")), ("granularity", ("model", "tensor", "channel"))):
            if getattr(self, name) not in known:
                raise FormatError(f"{name} is one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("shape_ratio", "scale_ratio", "step"):
            if not 0 < getattr(self, name) < math.inf:
                raise FormatError(f"{name} is a positive number, not {getattr(self, name)!r}")
        if not 0 <= self.rare < math.inf:
            raise FormatError(f"rare is a number of occurrences, 0 or more, not {self.rare!r}")
        for name in ("shape_ratio", "scale_ratio", "step", "rare"):
            object.__setattr__(self, name, float(getattr(self, name)))  # equal settings are equal in words too


@dataclass(frozen=True)
class Specification:
    """The map of each row, by cell: T(w) = low(v) + f·(high(v) − low(v)) for a weight in cell v at f of its width.

    Attributes:
        step: Δ.
        lowest: the symbol of the first cell.
        low, high: (R, C) float64, T at the two ends of each occupied cell, in the units of the weights.
        stays: (R, C) bool, cells whose weights are left alone; all of a row that has no fit.
        shape: (R,) float64, ν of the fits; NaN for a row that has none.
    """

    step: float
    lowest: int
    low: Tensor
    high: Tensor
    stays: Tensor
    shape: Tensor

    def __call__(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """T(w) float64, not yet on the grid, and whether w moves; (R, m) like `block`."""
        block = block.cpu().double()
        cell = symbols_of(block, self.step)
        fraction = (block / self.step - cell + 0.5).clamp_(0.0, 1.0)
        at = cell.long() - self.lowest
        return torch.lerp(self.low.gather(1, at), self.high.gather(1, at), fraction), ~self.stays.gather(1, at)


def specify(histogram: Histogram, shaping: Shaping, total: int) -> Specification:
    """T_r(w) = Q(p_r(w); shape_ratio·ν_r, scale_ratio·α_r), p_r(w) = (b(v) + ½ + (c(v) − 1)·f) / n_r.

    v is the cell of w, c(v) its count, b(v) the count of all cells below it, f ∈ [0, 1] how far into its cell w lies:
    p is the rank that w is expected to have when the weights of a cell are spread evenly in it. So the whole map takes
    one histogram and no sorting; it is monotone, odd where the counts are, gives a lone weight the rank it has, and
    gives all weights of a cell one value only where they are equal. Q is evaluated at f = 0 and 1, and T is linear
    between. Rounded to the grid, T(w) are the values of which the target's histogram n·∫_cell f' is made.

    ν_r, α_r are the moment fit of the *quantized* row. A row stays as it is that has one value only, a deviation below
    MIN_STEPS·Δ, which such a grid would flatten, or a ν below MIN_SHAPE.

    Args:
        histogram: one row for each population, as `count` returns it for the shaping's step.
        shaping: the ratios and `rare`.
        total: the elements of all weights that are reshaped together, which `rare` refers to.
    """
    counts, totals, step = histogram.counts, histogram.counts.sum(dim=1).double(), shaping.step
    values, share = histogram.values.double() * step, counts.double() / totals[:, None]
    found = Moments(share @ values.abs(), share @ values.square(), totals)
    fitted = (found.second.sqrt() >= MIN_STEPS * step) & ((counts > 0).sum(dim=1) > 1)
    shape = torch.where(fitted, found.shape, torch.nan)
    fitted &= shape >= MIN_SHAPE
    stays = (counts < shaping.rare * totals[:, None] / total) | ~fitted[:, None]
    moves = (counts > 0) & ~stays
    row = moves.nonzero()[:, 0]
    inside, below, n = counts[moves].double(), (counts.cumsum(dim=1) - counts)[moves].double(), totals[row]
    nu, alpha = shaping.shape_ratio * shape[row], shaping.scale_ratio * found.scale(shape)[row]
    low = torch.zeros_like(counts, dtype=torch.float64)
    high = low.clone()
    low[moves] = ends = quantile(nu, alpha, (below + 0.5) / n)
    several = inside > 1
    ends = ends.clone()
    ends[several] = quantile(nu[several], alpha[several], ((below + inside - 0.5) / n)[several])
    high[moves] = ends
    return Specification(step, int(histogram.values[0]), low, high, stays, shape)


def respecify(rows: Tensor, specification: Specification, compensated: bool) -> tuple[Tensor, int]:
    """w' = Δ·round(T(w)/Δ) where w moves, else w; `compensated`: w' = c'·Δ·round(c·T(w)/Δ).

    c = √(Σw²/ΣT²) over the row's weights that move, and c', near 1, makes up for what the rounding changed, so that
    Σw'² = Σw² to the dtype's rounding. The scale comes before the grid: put on afterwards it would make the grid
    coarser, and what that saves would look like the shape's doing.

    Args:
        rows: (R, n) floating, the rows of one weight, whose values the specification's cells cover.
        specification: of R rows.
        compensated: keep Σw² of each row.

    Returns:
        w', (R, n), the dtype and device of `rows`; and how many of them moved.
    """
    step = specification.step
    blocks = rows.split(max(1, BLOCK_ELEMENTS // len(rows)), dim=1)
    factor = refined = torch.ones(len(rows), 1, dtype=torch.float64)
    if compensated:
        factor = _energy_ratio(blocks, specification, lambda target: target)
        refined = _energy_ratio(blocks, specification, lambda target: on_grid(factor * target, step))
    new, moved = torch.empty_like(rows), 0
    for block, out in zip(blocks, new.split(blocks[0].shape[1], dim=1)):
        target, moves = specification(block)
        out.copy_(torch.where(moves, refined * on_grid(factor * target, step), block.cpu().double()))
        moved += int(moves.sum())
    return new, moved


def _energy_ratio(
    blocks: tuple[Tensor, ...], specification: Specification, change: Callable[[Tensor], Tensor]
) -> Tensor:
    """√(Σw² / Σ change(T)²) over the weights of each row that move, (R, 1) float64; 1 where none do."""
    before = after = torch.zeros(len(blocks[0]), 1, dtype=torch.float64)
    for block in blocks:
        target, moves = specification(block)
        before = before + (block.cpu().double().square() * moves).sum(dim=1, keepdim=True)
        after = after + (change(target).square() * moves).sum(dim=1, keepdim=True)
    return torch.where(after > 0, (before / after).sqrt(), torch.ones_like(after))
