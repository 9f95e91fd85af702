"""(bits, quality) of a trained model on uniform grids: H(round(θ/Δ)) against the score at round(θ/Δ)·Δ."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ggpass.passes.backslash.grids import Grids
from ggpass.training import entropy_bits

from .task import Quality, Task, matrices

#: Δ = 2^-2 ... 2^-9, four to an octave where models usually end, one or two elsewhere.
STEPS = tuple(2.0**-e for e in (2, 2.5, 3, 3.5, 4, 4.25, 4.5, 4.75, 5, 5.25, 5.5, 5.75, 6, 6.5, 7, 7.5, 8, 9))

#: Batches of training rows whose gradients tell how far apart the matrices' own grids are.
GRADIENT_BATCHES = 50


@dataclass(frozen=True)
class Grid:
    """A step for each matrix.

    Attributes:
        step: Δ, their geometric mean over all weights.
        spread: γ of `ggpass.training.RateSettings`; 0: they are one.
        steps: Δ_i of each, in the order of `matrices`.
    """

    step: float
    spread: float
    steps: tuple[float, ...]


@dataclass(frozen=True)
class Point:
    """A model on one grid.

    Attributes:
        step: Δ; 0 for the model as it is.
        bits: zero-order entropy a weight, over all matrices; 32 for the model as it is.
        held_out, test: quality on the two splits.
        spread: γ of the grid.
    """

    step: float
    bits: float
    held_out: Quality
    test: Quality
    spread: float = 0.0


def uniform_grids(model: nn.Module, steps: Iterable[float] = STEPS) -> list[Grid]:
    """One step for all matrices."""
    count = len(matrices(model))
    return [Grid(step, 0.0, (step,) * count) for step in steps]


def own_grids(task: Task, model: nn.Module, spread: float, steps: Iterable[float] = STEPS) -> list[Grid]:
    """A step for each matrix by its gradients at the trained weights, as `RateSettings(spread=)` has them in training.

    Args:
        task: whose training rows give the gradients.
        model: trained, in eval mode.
        spread: γ.
        steps: Δ.
    """
    weights = matrices(model)
    gradients = _mean_square_gradients(task, model)
    found = []
    for step in steps:
        grids = Grids([weight.numel() for weight in weights], step, spread)
        grids.follow(gradients)
        found.append(Grid(step, spread, tuple(grids.steps)))
    return found


def _mean_square_gradients(task: Task, model: nn.Module) -> list[Tensor]:
    """√E[g²] of each weight over some batches of training rows."""
    weights = matrices(model)
    squares = [torch.zeros_like(weight) for weight in weights]
    batches = list(itertools.islice(task.epoch(torch.Generator().manual_seed(0)), GRADIENT_BATCHES))
    for batch in batches:
        for square, gradient in zip(squares, torch.autograd.grad(task.loss(model, batch), weights)):
            square.addcmul_(gradient, gradient, value=1 / len(batches))
    return [square.sqrt_() for square in squares]


def grid_points(
    task: Task, model: nn.Module, grids: Iterable[Grid], tables: Literal["one", "each"] = "one"
) -> list[Point]:
    """The model as it is, then on each grid; its weights are the same bits afterwards.

    Biases and norms stay as they are and are not counted, for every method alike: they are below 0.5 % of the values.
    A grid on which no symbol but 0 is left, or whose entropy is above 8 bits, is left out.

    Args:
        task: whose quality is asked.
        model: trained, in eval mode.
        grids: to measure on.
        tables: as `entropy_bits` takes it.
    """
    points = [Point(0.0, 32.0, task.quality(model, "held_out"), task.quality(model, "test"))]
    weights = matrices(model)
    originals = [weight.detach().clone() for weight in weights]
    try:
        for grid in grids:
            bits = entropy_bits(originals, grid.steps, tables=tables)
            if not 0 < bits <= 8:
                continue
            put_on(weights, originals, grid.steps)
            held_out, test = task.quality(model, "held_out"), task.quality(model, "test")
            points.append(Point(grid.step, bits, held_out, test, grid.spread))
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals):
                weight.copy_(original)
    return points


@torch.no_grad()
def put_on(weights: Iterable[nn.Parameter], originals: Iterable[Tensor], steps: Sequence[float]) -> None:
    """w ← Δ_i·round(θ/Δ_i)."""
    for weight, original, step in zip(weights, originals, steps):
        weight.copy_((original / step).round_().mul_(step))
