"""Asked for b bits a weight, reached b': why a training missed its target."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from ggpass.passes.backslash.controller import FOLLOW, LARGEST_DROP, Controller
from ggpass.passes.backslash.settings import RateSettings

#: Of a training's measurements; a hindrance in fewer of them is not why a target was missed.
NOTABLE = 0.2

#: Of the weights; as many that no step reached are why.
ABSENT = 0.05


@dataclass
class Diagnostics:
    """The course of a training towards a target: the reasons to look for if it is missed.

    Attributes:
        present: since λ was last chosen, in how many steps each weight tensor had a gradient.
        absences: Σ over the choices of each tensor's share of steps without a gradient.
        reach: running mean of each tensor's share of steps with a gradient; empty before the second choice.
        chosen_at: the step at which λ was last chosen; −1 before the first.
        choices: how often λ was chosen.
        powerless: choices in which even the largest λ brings about less than half of what was needed.
        largest_rate, last_rate: learning rate, in the mean over the weights.
        bits_ahead_of_tail: at the last measurement of a step with a rate.
    """

    present: list[int]
    absences: list[float]
    reach: list[float] = field(default_factory=list)
    chosen_at: int = -1
    choices: int = 0
    powerless: int = 0
    largest_rate: float = 0.0
    last_rate: float = 0.0
    bits_ahead_of_tail: float = math.nan

    def note_step(self, indices: Iterable[int]) -> None:
        """Note the weights that a step reaches."""
        for index in indices:
            self.present[index] += 1

    def shares_with_gradient(self, weights: Sequence[nn.Parameter], steps: int) -> list[float]:
        """Return the share of steps in which each tensor had a gradient, lately; at first, as it is now.

        The forecast of λ takes it, for experts that few batches reach. 1 exactly for a weight of every step.
        """
        if self.chosen_at < 0:
            shares = [float(weight.grad is not None) for weight in weights]
        else:
            shares = [number / max(1, steps - self.chosen_at) for number in self.present]
            shares = [old + FOLLOW * (new - old) for old, new in zip(self.reach or shares, shares)]
            self.reach = shares
        self.absences = [a + max(0.0, 1 - share) for a, share in zip(self.absences, shares)]
        self.present, self.chosen_at = [0] * len(weights), steps
        return shares

    def note_choice(self, needed: float, foreseen: float, rate: float) -> None:
        """Note a choice of λ.

        Args:
            needed: ln of the factor that was to be applied to the bits; at most 0.
            foreseen: what the chosen λ is forecast to apply.
            rate: learning rate, in the mean over the weights.
        """
        self.choices += 1
        self.powerless += foreseen > needed / 2
        self.largest_rate, self.last_rate = max(self.largest_rate, rate), rate

    def reasons(
        self,
        goal: Controller,
        settings: RateSettings,
        steps: int,
        bits: float,
        sizes: Sequence[int],
        names: Sequence[str],
    ) -> Iterator[str]:
        """Yield each hindrance that shows, with the remedy; the first one explains the most."""
        total, count = settings.total_steps, sum(sizes)
        if total is not None and steps < total:
            yield f"the training ended ahead of total_steps={total}; give the real number of optimizer steps"
        if total is None and steps < goal.start_step + goal.ramp:
            yield f"the ramp of {goal.ramp} steps was not over; give total_steps=, or a shorter ramp in the schedule"
        tail = settings.schedule.steps(settings.schedule.tail, total)
        if tail and not goal.misses(self.bits_ahead_of_tail):
            yield (
                f"the tail of {tail} steps trains without a rate, and the bits were {self.bits_ahead_of_tail:.2f} "
                "ahead of it; shorten it, or ask for fewer bits"
            )
        jump = math.log2(max(2, count)) / max(1, count)  # in H, of another symbol for one weight
        if abs(bits - goal.target) <= jump:
            yield f"one weight of only {count} changes the bits by about {jump:.2f}; no λ brings them closer"
        if bits <= goal.target and goal.began_below:
            yield (
                f"the weights began with {goal.first_bits:.2f}, and a rate adds none; ask for fewer, or give a smaller "
                "step= (Δ of the grid)"
            )
        if bits <= goal.target:
            yield (
                "λ had lowered them further than was forecast, and too few steps were left for them to grow again; "
                "train longer, or give a smaller refit_every"
            )
        missing = [share * size for share, size in zip(self.absences, sizes)]
        absent = sum(missing) / max(1, self.choices * count)
        if absent > ABSENT:
            some = ", ".join(names[i] for i in sorted(range(len(names)), key=lambda i: -missing[i])[:3])
            yield (
                f"{100 * absent:.0f} % of the weights had no gradient in the mean over the steps ({some}), as experts "
                "that no token reaches, and steps leave them alone; train them, or skip= them"
            )
        if self.largest_rate == 0:
            yield "the learning rate was 0, by which the rate's steps are scaled"
        if goal.hurried > NOTABLE * self.choices:
            yield (
                f"from one measurement to the next λ lowers them by at most {100 * (1 - math.exp(-LARGEST_DROP)):.0f} "
                f"%, and there were {self.choices} in all; give more steps, or a schedule with a longer ramp"
            )
        if self.powerless > NOTABLE * self.choices:
            yield (
                f"at a learning rate of {self.last_rate:.2g} no λ moves the weights far enough; train longer or at a "
                "higher learning rate, let it decay later, or give a larger step= (Δ of the grid)"
            )
        if self.last_rate > self.largest_rate / 2:
            yield (
                f"the learning rate was still {self.last_rate:.2g} at the end, where the loss moves the bits between "
                "two measurements; let it decay, or give a smaller refit_every"
            )
        yield "the loss moved the bits faster than λ followed; train longer, or give a smaller refit_every"
