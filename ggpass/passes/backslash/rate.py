"""λ, ν, α in force for each weight: fitted to the weights, measured in bits, and controlled to reach a target."""

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from torch import nn

from ggpass.errors import InputError, WeightError
from ggpass.ggd.grid import Histogram
from ggpass.passes.backslash.controller import Controller, solve
from ggpass.passes.backslash.diagnostics import Diagnostics
from ggpass.passes.backslash.forecast import forecast
from ggpass.passes.backslash.grids import Grids
from ggpass.passes.backslash.priors import Priors
from ggpass.passes.backslash.proximal import Slope, add_slope_, shrink_
from ggpass.passes.backslash.settings import RateSettings
from ggpass.passes.backslash.sharded import local_part
from ggpass.passes.backslash.statistics import histogram, moments

log = logging.getLogger(__name__)

#: id(Parameter) -> learning rate.
Rates = Mapping[int, float]


class Rate:
    """The slope of each weight's rate at each step; weights without a gradient are left alone.

    Attributes:
        names, weights: of all regularized weights, in one order.
        steps: done so far.
        priors: ν and α of each weight.
        grids: Δ of each weight.
        strength: λ in force, before the schedule's factor.
        used: the last λ above 0 that stepped weights; 0 before the first.
        measured: bits a weight and share of zeros after the step of the last measurement; NaN before the first.
        diagnostics: of a target that is missed.
        controller: of λ; None if λ is given.
    """

    def __init__(
        self, names: Sequence[str], weights: Sequence[nn.Parameter], settings: RateSettings, target: float | None
    ) -> None:
        """Start ahead of the first step.

        Args:
            names, weights: to regularize.
            settings: as given.
            target: bits a weight; None if λ is given.
        """
        self.names, self.weights, self.settings = names, weights, settings
        self.steps = 0
        self.priors = Priors(len(names))
        self.grids = Grids([weight.numel() for weight in weights], settings.step, settings.spread)
        self.strength = settings.strength or 0.0
        self.used = 0.0
        self.measured = (math.nan, math.nan)
        self.diagnostics = Diagnostics([0] * len(names), [0.0] * len(names))
        self.controller: Controller | None = None
        if target is not None:
            ramp = settings.schedule.steps(settings.schedule.ramp, settings.total_steps)
            self.controller = Controller(target, ramp)
        self._fitted_at = -1

    @property
    def in_tail(self) -> bool:
        """Return True if the step that comes is of the fine-tune tail, without a rate."""
        return self.settings.schedule.in_tail(self.steps, self.settings.total_steps)

    @property
    def factor(self) -> float:
        """m of the schedule at the step that comes."""
        return self.settings.schedule.factor(self.steps, self.settings.total_steps)

    def held_by(self, rates: Rates) -> list[tuple[int, nn.Parameter]]:
        """Return the weights that have a learning rate, with their numbers."""
        return [(index, weight) for index, weight in enumerate(self.weights) if id(weight) in rates]

    # The slope.

    def slope(self, index: int, factor: float, *, bounded: bool = False) -> Slope:
        """factor·ρ'(|θ|) of one weight.

        In the proximal mode it counts in steps of the weight's own grid, as Adam's step does in gradients. Adam divides
        by g_i, so that a threshold of λ·ρ' would be λ·g_i in loss per bit; grids spread by γ = 1 undo it.

        Args:
            index: of the weight.
            factor: lr·λ·m, or what stands for it; 0 if there is nothing to do.
            bounded: whether to hold it to a factor that moves a weight by a share of its tensor's deviation.
        """
        settings, epsilon = self.settings, self.settings.slope_epsilon
        if settings.epsilon is None and settings.mode != "paper-code":
            epsilon = self.grids.steps[index]
        if settings.mode == "proximal":
            factor *= self.grids.steps[index] / settings.step
        log_factor = self.priors.log_slope(index) + math.log(factor) if factor > 0 else -math.inf
        if bounded:
            log_factor = min(log_factor, self.priors.log_largest_factor(index, epsilon))
        return Slope(log_factor, self.priors.shapes[index], epsilon)

    def join_gradients(self, rates: Rates, scale: float) -> None:
        """g ← g + scale·λ·m·ρ'(|θ|)·sign(θ), in the coupled modes.

        Args:
            rates: of the weights that are about to be stepped.
            scale: the factor that the gradients are multiplied by.

        Raises:
            InputError: a sparse gradient.
        """
        chosen = [(i, w, w.grad) for i, w in self.held_by(rates) if w.grad is not None]
        for index, _, gradient in chosen:
            if gradient.is_sparse:
                raise InputError(
                    f"{self.names[index]} has a sparse gradient, which mode={self.settings.mode!r} would fill up; skip "
                    "it, train it with sparse=False, or use mode='proximal'"
                )
        factor = scale * self.strength * self.factor
        slopes = [self.slope(index, factor) for index, _, _ in chosen]
        add_slope_([local_part(g) for _, _, g in chosen], [local_part(w) for _, w, _ in chosen], slopes)

    def step_weights(self, rates: Rates) -> None:
        """θ ← prox(θ), or θ −= λ·ν/N·(…): the modes that act after the optimizer, "proximal" and "paper-code".

        Args:
            rates: of the weights that the optimizer has stepped.
        """
        chosen = [(i, w) for i, w in self.held_by(rates) if w.grad is not None]
        tensors = [local_part(weight) for _, weight in chosen]
        seed = self.steps * 2_654_435_761  # far from that of any other step, modulo 2^32
        self.diagnostics.note_step([i for i, _ in chosen])
        factor = self.strength * self.factor
        if chosen and factor > 0:
            self.used = self.strength
        if self.settings.is_paper:
            slopes = [self.slope(i, factor) for i, _ in chosen]
            add_slope_(tensors, tensors, slopes, sign=-1, seed=seed)
        else:
            shrink_(tensors, [self.slope(i, rates[id(w)] * factor, bounded=True) for i, w in chosen], seed)

    # Fits, bits and λ.

    def follow(self) -> None:
        """Let grids of their own follow the gradients, ahead of the step that comes; at every interval."""
        if self.settings.spread and self.steps % self.settings.interval == 0:
            self.grids.follow([weight.grad for weight in self.weights])

    def refit(self, rates: Rates) -> str:
        """Fit ν and α if that is due at the step that comes; if there is a target, move λ.

        Args:
            rates: the learning rate of every weight that an optimizer holds.

        Returns:
            A message for the report, or ''.
        """
        measures = self.steps % self.settings.interval == 0
        if self.steps == self._fitted_at or not (measures or self.settings.mode == "paper-coupled"):
            return ""
        self._fitted_at = self.steps
        self._warn_of_broken(self.priors.update(self.weights, self.settings))
        if self.controller is None or not measures:
            return ""
        bits = self._histogram().bits
        self.strength = self._choose_strength(self.controller, bits, rates)
        return self.controller.surplus(self.steps, bits, self.strength)

    def _choose_strength(self, controller: Controller, bits: float, rates: Rates) -> float:
        """Return the λ that is forecast to take the bits where the plan wants them at the next measurement."""
        interval, total = self.settings.interval, self.settings.total_steps
        if total is not None:
            interval = min(interval, max(1, total - self.steps))
        mean_rate = sum(rates.values()) / max(1, len(rates))
        drop = controller.needed_drop(self.steps, self.steps + interval, bits, mean_rate)
        factor = interval * self.factor
        shares = self.diagnostics.shares_with_gradient(self.weights, self.steps)
        chosen = [(i, w) for i, w in self.held_by(rates) if i not in self.priors.broken]
        slopes = [self.slope(i, factor * shares[i] * rates[id(w)]) for i, w in chosen]
        expected = forecast([w for _, w in chosen], slopes, [self.grids.steps[i] for i, _ in chosen])
        strength = solve(expected.log_drop, drop, expected.largest)
        foreseen = expected.log_drop(strength)
        controller.forecast = bits * math.exp(foreseen)
        self.diagnostics.note_choice(drop, foreseen, mean_rate)
        return strength

    def end_step(self) -> str:
        """Count the step, and the bits of the weights as it has left them if they are due.

        They are at the first step of every interval, in the tail too, and at the last step of all.

        Returns:
            Why the target is missed, after the last step of all; else ''.
        """
        last = self.steps + 1 == self.settings.total_steps
        if last or self.steps % self.settings.interval == 0:
            self._measure()
        self.steps += 1
        return self.missed() if last else ""

    def _measure(self) -> None:
        try:
            counted = self._histogram()
        except WeightError:  # since the last fit the optimizer's step has brought NaN or infinity
            self._warn_of_broken(self.priors.find_broken(moments(self.weights)))
            counted = self._histogram()
        self.measured = (counted.bits, counted.zeros)
        if not self.in_tail:
            self.diagnostics.bits_ahead_of_tail = counted.bits

    def _histogram(self) -> Histogram:
        """Return the symbols of all usable weights, each on its grid."""
        usable = [index for index in range(len(self.weights)) if index not in self.priors.broken]
        return histogram([self.weights[i] for i in usable], [self.grids.steps[i] for i in usable])

    def _warn_of_broken(self, indices: Sequence[int]) -> None:
        for index in indices:
            log.warning("%s holds NaN or infinity: its rate is left as it was", self.names[index])

    # For the user.

    def status(self) -> str:
        """`1.53 bits/weight, λ 0.0012, 43 % zeros`; at the end the λ that was used last, and a target if missed."""
        bits, zeros = self.measured
        if math.isnan(bits):
            return "not measured yet"
        over = self.steps > 0 and (self.in_tail or self.steps == self.settings.total_steps)
        text = f"{bits:.2f} bits/weight, λ {(over and self.used) or self.strength:.2g}, {100 * zeros:.0f} % zeros"
        if over and self.controller is not None and self.controller.misses(bits):
            text += f", asked {self.controller.target:.2f}"
        return text

    def missed(self) -> str:
        """Asked for so many bits, reached others, because …; '' if a target is met, reported, or none."""
        goal, bits = self.controller, self.measured[0]
        if goal is None or math.isnan(bits) or not goal.misses(bits):
            return ""
        if goal.reported_surplus and bits < goal.target:
            return ""
        why = next(self.diagnostics.reasons(goal, self.settings, self.steps, bits, self.grids.counts, self.names))
        return f"asked {goal.target:.2f} bits a weight, reached {bits:.2f} after {self.steps} steps, because {why}"

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and one tensor."""
        state: dict[str, Any] = {
            "steps": self.steps,
            "strength": self.strength,
            "used": self.used,
            "measured_bits": self.measured[0],
            "measured_zeros": self.measured[1],
            "fits": self.priors.as_tensor(),
            "course": asdict(self.diagnostics),
        }
        if self.settings.spread:
            state["grids"] = self.grids.as_tensor()
        if self.controller is not None:
            numbers = asdict(self.controller).items()
            state["controller"] = {name: value for name, value in numbers if name not in ("target", "ramp")}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; a λ given in the settings stays."""
        self.steps = int(state["steps"])
        if self.settings.has_target:
            self.strength = float(state["strength"])
        self.used = float(state["used"])
        self.measured = (float(state["measured_bits"]), float(state["measured_zeros"]))
        self.priors.load_tensor(state["fits"])
        if "grids" in state:
            self.grids.load_tensor(state["grids"])
        self.diagnostics = Diagnostics(**copy.deepcopy(state["course"]))
        self._fitted_at = -1
        if self.controller is not None:
            self.controller = replace(self.controller, **state["controller"])
