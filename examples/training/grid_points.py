"""(bits, quality) of a trained model on uniform grids: H(round(θ/Δ)) against the score at round(θ/Δ)·Δ."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ggpass.training import entropy_bits

from .task import Quality, Task, matrices

#: Δ = 2^-2 ... 2^-9, four to an octave where models usually end, one or two elsewhere.
STEPS = tuple(2.0**-e for e in (2, 2.5, 3, 3.5, 4, 4.25, 4.5, 4.75, 5, 5.25, 5.5, 5.75, 6, 6.5, 7, 7.5, 8, 9))


@dataclass(frozen=True)
class Point:
    """A model on one grid.

    Attributes:
        step: Δ; 0 for the model as it is.
        bits: zero-order entropy a weight, over all matrices; 32 for the model as it is.
        held_out, test: quality on the two splits.
    """

    step: float
    bits: float
    held_out: Quality
    test: Quality


def grid_points(task: Task, model: nn.Module, steps: Iterable[float] = STEPS) -> list[Point]:
    """The model as it is, then on each grid; its weights are the same bits afterwards.

    Biases and norms stay as they are and are not counted, for every method alike: they are below 0.5 % of the values.
    A grid on which no symbol but 0 is left, or whose entropy is above 8 bits, is left out.
    """
    points = [Point(0.0, 32.0, task.quality(model, "held_out"), task.quality(model, "test"))]
    weights = matrices(model)
    originals = [weight.detach().clone() for weight in weights]
    try:
        for step in steps:
            bits = entropy_bits(originals, step)
            if not 0 < bits <= 8:
                continue
            with torch.no_grad():
                for weight, original in zip(weights, originals):
                    weight.copy_((original / step).round_().mul_(step))
            points.append(Point(step, bits, task.quality(model, "held_out"), task.quality(model, "test")))
    finally:
        with torch.no_grad():
            for weight, original in zip(weights, originals):
                weight.copy_(original)
    return points
