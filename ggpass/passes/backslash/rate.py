"""λ, ν, α in force for each weight: fitted to the weights, measured in bits, and controlled to reach a target."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ggpass.errors import InputError, WeightError
from ggpass.passes.backslash.controller import Controller, solve
from ggpass.passes.backslash.priors import Priors
from ggpass.passes.backslash.forecast import forecast
from ggpass.ggd.grid import Histogram
from ggpass.passes.backslash.grid import histogram
from ggpass.passes.backslash.grids import Grids
from ggpass.passes.backslash.diagnostics import Diagnostics
from ggpass.passes.backslash.proximal import Slope, add_slope_, shrink_
from ggpass.passes.backslash.settings import RateSettings
from ggpass.passes.backslash.sharded import local_part

log = logging.getLogger(__name__)

#: id(Parameter) -> learning rate.
Rates = Mapping[int, float]

#: Weights by their numbers in the Rate.
Numbered = Sequence[tuple[int, nn.Parameter]]


class Rate:
    """The slope of each weight's rate at each step. It holds no weight: callers hand them in.

    Attributes:
        priors: ν and α of each weight.
        grids: Δ of each weight.
        strength: λ in force, before the schedule's factor.
        used: the last λ above 0 that stepped weights; 0 before the first.
        measured: bits a weight and share of zeros after the step of the last measurement; NaN before the first.
        diagnostics: of a target that is missed.
    """

    def __init__(
        self, names: Sequence[str], counts: Sequence[int], settings: RateSettings, target: float | None
    ) -> None:
        """Start ahead of the first step.

        Args:
            names: of the weights, in the order in which they are handed in.
            counts: elements of each.
            settings: as given.
            target: bits a weight; None where λ is given.
        """
        self.names, self.settings = names, settings
        self.priors = Priors(len(names))
        self.grids = Grids(counts, settings.step, settings.spread)
        self.strength = settings.strength or 0.0
        self.used = 0.0
        self.measured = (math.nan, math.nan)
        self.diagnostics = Diagnostics(len(names))
        self.controller: Controller | None = None
        if target is not None:
            ramp = settings.schedule.steps(settings.schedule.ramp, settings.total_steps)
            self.controller = Controller(target, ramp)
        self._fitted_at = -1

    def in_tail(self, steps: int) -> bool:
        """Return True if the step that comes is of the fine-tune tail, without a rate."""
        return self.settings.schedule.in_tail(steps, self.settings.total_steps)

    def factor(self, steps: int) -> float:
        """m of the schedule at the step that comes."""
        return self.settings.schedule.factor(steps, self.settings.total_steps)

    # The slope.

    def slope(self, index: int, log_factor: float) -> Slope:
        """ρ'(|θ|) of one weight, times a factor."""
        return Slope(log_factor, self.priors.shapes[index], self.epsilon(index))

    def follow(self, steps: int, weights: Sequence[nn.Parameter]) -> None:
        """Let grids of their own follow the gradients, ahead of the step that comes; at every interval."""
        if self.settings.spread and steps % self.settings.interval == 0:
            self.grids.follow([weight.grad for weight in weights])

    def epsilon(self, index: int) -> float:
        """ε of one weight's slope: as given, or the step of its grid."""
        own = self.settings.epsilon is None and self.settings.mode != "paper-code"
        return self.grids.steps[index] if own else self.settings.slope_epsilon

    def log_slope(self, index: int) -> float:
        """ln(ν/(α^ν ln 2)); the proximal step counts in steps of the weight's own grid, as Adam's does in gradients.

        Adam divides by g_i, so that a threshold of λ·ρ' would be λ·g_i in loss per bit; grids spread by γ = 1 undo it.
        """
        steps = math.log(self.grids.steps[index] / self.settings.step) if self.settings.mode == "proximal" else 0.0
        return self.priors.log_slope(index) + steps

    def log_factor(self, index: int, steps: int, rate: float = 1.0) -> float:
        """ln of what multiplies (|θ|+ε)^(ν−1): lr·λ·m·ν/(α^ν ln 2); −∞ where there is nothing to do."""
        return self.log_slope(index) + _log(rate * self.strength * self.factor(steps))

    def bounded_factor(self, index: int, steps: int, rate: float) -> float:
        """Return the same, held to a factor that moves a weight by a share of its tensor's deviation."""
        largest = self.priors.log_largest_factor(index, self.epsilon(index))
        return min(self.log_factor(index, steps, rate), largest)

    def join_gradients(self, steps: int, weights: Numbered, log_scale: float) -> None:
        """g ← g + e^log_scale·λ·m·ρ'(|θ|)·sign(θ), in the coupled modes.

        Args:
            steps: done so far.
            weights: with their numbers here; those without a gradient are left alone.
            log_scale: ln of the factor that the gradients are multiplied by.

        Raises:
            InputError: a sparse gradient.
        """
        chosen = [(i, w, w.grad) for i, w in weights if w.grad is not None]
        for index, _, gradient in chosen:
            if gradient.is_sparse:
                raise InputError(
                    f"{self.names[index]} has a sparse gradient, which mode={self.settings.mode!r} would fill up; skip "
                    "it, train it with sparse=False, or use mode='proximal'"
                )
        slopes = [self.slope(index, self.log_factor(index, steps) + log_scale) for index, _, _ in chosen]
        add_slope_([local_part(g) for _, _, g in chosen], [local_part(w) for _, w, _ in chosen], slopes)

    def step_weights(self, steps: int, weights: Numbered, rates: Rates) -> None:
        """θ ← prox(θ), or θ −= λ·ν/N·(…): the modes that act after the optimizer, "proximal" and "paper-code".

        Args:
            steps: done so far.
            weights: with their numbers here; those without a gradient are left alone.
            rates: the learning rate of each.
        """
        chosen = [(i, w) for i, w in weights if w.grad is not None]
        tensors = [local_part(weight) for _, weight in chosen]
        seed = steps * 2_654_435_761  # far from that of any other step, modulo 2^32
        self.diagnostics.note_step([i for i, _ in chosen])
        if chosen and self.strength * self.factor(steps) > 0:
            self.used = self.strength
        if self.settings.is_paper:
            slopes = [self.slope(i, self.log_factor(i, steps)) for i, _ in chosen]
            add_slope_(tensors, tensors, slopes, sign=-1, seed=seed)
        else:
            shrink_(tensors, [self.slope(i, self.bounded_factor(i, steps, rates[id(w)])) for i, w in chosen], seed)

    # Fits, bits and λ.

    def due(self, steps: int) -> bool:
        """Return True if the weights are to be fitted at the step that comes."""
        if steps == self._fitted_at:
            return False
        return steps % self.settings.interval == 0 or self.settings.mode == "paper-coupled"

    def refit(
        self, steps: int, weights: Sequence[nn.Parameter], rates: Callable[[], Rates], warn: Callable[[str], None]
    ) -> None:
        """Fit ν and α; where there is a target, move λ.

        Args:
            steps: done so far.
            weights: as they are now.
            rates: gives the learning rate of every weight that an optimizer holds.
            warn: takes a message for the report.
        """
        self._fitted_at = steps
        self._warn_of_broken(self.priors.update(weights, self.settings))
        if self.controller is None or steps % self.settings.interval:
            return
        bits = self._histogram(weights).bits
        self.strength = self._choose_strength(self.controller, bits, steps, weights, rates())
        if self.controller.needs_no_rate(steps, bits, self.strength):
            warn(self.controller.surplus(bits))

    def _choose_strength(
        self, controller: Controller, bits: float, steps: int, weights: Sequence[nn.Parameter], rates: Rates
    ) -> float:
        """Return the λ that is forecast to take the bits where the plan wants them at the next measurement."""
        interval, total = self.settings.interval, self.settings.total_steps
        if total is not None:
            interval = min(interval, max(1, total - steps))
        mean_rate = sum(rates.values()) / max(1, len(rates))
        drop = controller.needed_drop(steps, steps + interval, bits, mean_rate)
        factor = interval * self.factor(steps)
        shares = self.diagnostics.shares_with_gradient(weights, steps)
        chosen = [i for i, w in enumerate(weights) if id(w) in rates and i not in self.priors.broken]
        slopes = [self.slope(i, self.log_slope(i) + _log(factor * shares[i] * rates[id(weights[i])])) for i in chosen]
        expected = forecast([weights[i] for i in chosen], slopes, [self.grids.steps[i] for i in chosen])
        strength = solve(expected.log_drop, drop, expected.largest)
        foreseen = expected.log_drop(strength)
        controller.expect(bits, foreseen)
        self.diagnostics.note_choice(drop, foreseen, mean_rate)
        return strength

    def measure(self, steps: int, weights: Sequence[nn.Parameter]) -> None:
        """Count the bits of the weights as the step number `steps` has left them, where they are due.

        They are at the first step of every interval, in the tail too, and at the last step of all.
        """
        last = steps + 1 == self.settings.total_steps
        if steps % self.settings.interval and not last:
            return
        counted = self._count(weights)
        self.measured = (counted.bits, counted.zeros)
        if not self.in_tail(steps):
            self.diagnostics.bits_ahead_of_tail = counted.bits

    def _count(self, weights: Sequence[nn.Parameter]) -> Histogram:
        try:
            return self._histogram(weights)
        except WeightError:  # since the last fit the optimizer's step has brought NaN or infinity
            self._warn_of_broken(self.priors.find_broken(weights))
            return self._histogram(weights)

    def _histogram(self, weights: Sequence[nn.Parameter]) -> Histogram:
        """Return the symbols of all usable weights, each on its grid."""
        usable = [index for index in range(len(weights)) if index not in self.priors.broken]
        return histogram([weights[i] for i in usable], [self.grids.steps[i] for i in usable])

    def _warn_of_broken(self, indices: Sequence[int]) -> None:
        for index in indices:
            log.warning("%s holds NaN or infinity: its rate is left as it was", self.names[index])

    # For the user.

    def status(self, steps: int) -> str:
        """`1.53 bits/weight, λ 0.0012, 43 % zeros`; at the end the λ that was used last, and a target if missed."""
        bits, zeros = self.measured
        if math.isnan(bits):
            return "not measured yet"
        over = steps > 0 and (self.in_tail(steps) or steps == self.settings.total_steps)
        strength = (self.used if over else 0.0) or self.strength
        text = f"{bits:.2f} bits/weight, λ {strength:.2g}, {100 * zeros:.0f} % zeros"
        missed = over and self.controller is not None and self.controller.misses(bits)
        return f"{text}, asked {self.controller.target:.2f}" if missed and self.controller is not None else text

    def missed(self, steps: int, weights: Sequence[nn.Parameter], names: Sequence[str]) -> str:
        """Asked for so many bits, reached others, because …; '' if a target is met, reported, or none."""
        bits = self.measured[0]
        if self.controller is None or math.isnan(bits) or not self.controller.misses(bits):
            return ""
        if self.controller.reported_surplus and bits < self.controller.target:
            return ""
        return self.diagnostics.message(self.controller, self.settings, steps, bits, weights, names)

    # State.

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and one tensor."""
        state: dict[str, Any] = {
            "strength": self.strength,
            "used": self.used,
            "measured_bits": self.measured[0],
            "measured_zeros": self.measured[1],
            "fits": self.priors.as_tensor(),
            "course": self.diagnostics.state_dict(),
        }
        if self.settings.spread:
            state["grids"] = self.grids.as_tensor()
        if self.controller is not None:
            state["controller"] = self.controller.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; a λ given in the settings stays."""
        if self.settings.has_target:
            self.strength = float(state["strength"])
        self.used = float(state["used"])
        self.measured = (float(state["measured_bits"]), float(state["measured_zeros"]))
        self.priors.load_tensor(state["fits"])
        if "grids" in state:
            self.grids.load_tensor(state["grids"])
        self.diagnostics.load_state_dict(state["course"])
        self._fitted_at = -1
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
