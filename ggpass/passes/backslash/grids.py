"""Δ_i = Δ·(ḡ/g_i)^γ, g_i = √E[(∂D/∂θ)²]: the grid of each weight, coarser where the loss feels a step less."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ggpass.passes.backslash.statistics import moments

#: The weight of the newest gradients in the running mean of ln g_i: the last few measurements count, since the first
#: gradients of a training tell little of the ones it ends with.
FOLLOW = 0.2


class Grids:
    """The steps of the weights' grids, which follow their gradients until the model is on them.

    Rounding to a grid of step Δ_i costs about h_i·Δ_i²/24 of loss a weight, h_i the curvature, and halving it costs a
    bit a weight: the slopes are equal if h_i·Δ_i² is the same for all. Squared gradients stand for the curvature
    (the empirical Fisher information), so γ = 1 gives equal slopes as far as they do, and γ = 0 one step for all.
    The geometric mean of the Δ_i over all weights stays Δ, hence the bits about what they were with one step.

    Attributes:
        log_gradients: ln g_i, a running mean; NaN before a weight's first gradient.
        steps: Δ_i of each weight, in units of weight; Δ if it has had no gradient.
    """

    def __init__(self, counts: Sequence[int], step: float, spread: float) -> None:
        """As it is ahead of the first gradient: one step for all.

        Args:
            counts: elements of each weight, of all ranks.
            step: Δ > 0, in units of weight.
            spread: γ from 0 to 1.
        """
        self.counts, self.step, self.spread = counts, step, spread
        self.log_gradients = [math.nan] * len(counts)
        self.steps = [step] * len(counts)

    def follow(self, gradients: Sequence[Tensor | None]) -> None:
        """Let the steps follow the gradients of a step; one that is missing, all zero or not finite tells nothing.

        Of DTensors every rank must call this.
        """
        there = [index for index, gradient in enumerate(gradients) if gradient is not None]
        found = moments([gradient for gradient in gradients if gradient is not None])
        for index, usable, second in zip(there, found.usable.tolist(), found.second.tolist()):
            if usable:
                new, old = math.log(second) / 2, self.log_gradients[index]
                self.log_gradients[index] = new if math.isnan(old) else old + FOLLOW * (new - old)
        self._set_steps()

    def _set_steps(self) -> None:
        known = [(g, n) for g, n in zip(self.log_gradients, self.counts) if not math.isnan(g)]
        mean = sum(g * n for g, n in known) / max(1, sum(n for _, n in known))
        spread = [
            self.step if math.isnan(g) else self.step * math.exp(self.spread * (mean - g)) for g in self.log_gradients
        ]
        # Of float32, which files hold, unless it is the step that was given.
        self.steps = [d if d == self.step else torch.tensor(d, dtype=torch.float32).item() for d in spread]

    def as_tensor(self) -> Tensor:
        """(T,) float64: ln g_i."""
        return torch.tensor(self.log_gradients, dtype=torch.float64)

    def load_tensor(self, state: Tensor) -> None:
        """Continue from `as_tensor()`."""
        self.log_gradients = state.double().tolist()
        self._set_steps()
