"""ln λ ← ln λ + kp·Δe + ki·e, e = ln(bits / planned bits): the strength that lands on a target."""

import math
from dataclasses import dataclass

from ggpass.training.schedule import Schedule

#: Gains of the proportional and the integral part, by which e moves ln λ at one measurement.
PROPORTIONAL = 4.0
INTEGRAL = 0.5

#: |Δ ln λ| at one measurement stays within this.
LARGEST_MOVE = 0.7


@dataclass
class Controller:
    """Holds λ so that measured bits follow a plan from where they start to the target.

    Attributes:
        target: bits a weight.
        ramp: steps that the plan takes.
        strength: λ as it stands; 0 until the first measurement.
        start_bits, start_step: the first measurement.
        last_error: e at the last one.
    """

    target: float
    ramp: int
    strength: float = 0.0
    start_bits: float = math.nan
    start_step: int = 0
    last_error: float = 0.0

    def planned(self, step: int) -> float:
        """The bits that the plan wants at a step: geometric from the start to the target."""
        done = min(1.0, (step - self.start_step) / max(1, self.ramp))
        return self.start_bits ** (1 - done) * self.target**done

    def update(self, step: int, bits: float, first_strength: float) -> float:
        """λ after a measurement of the bits at a step.

        Args:
            step: optimizer steps so far.
            bits: measured, a weight.
            first_strength: λ to begin with, at the first measurement.
        """
        bits = max(bits, 1e-6)
        if math.isnan(self.start_bits):
            self.start_bits, self.start_step, self.strength = max(bits, self.target), step, first_strength
            return self.strength
        error = math.log(bits / self.planned(step))
        move = PROPORTIONAL * (error - self.last_error) + INTEGRAL * error
        self.last_error = error
        self.strength *= math.exp(max(-LARGEST_MOVE, min(LARGEST_MOVE, move)))
        return self.strength

    def state_dict(self) -> dict[str, float]:
        """Plain numbers."""
        return {name: getattr(self, name) for name in ("strength", "start_bits", "start_step", "last_error")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict()`."""
        for name, value in state.items():
            setattr(self, name, value)


def ramp_steps(schedule: Schedule, total_steps: int | None) -> int:
    """The steps between the first measurement and the target."""
    return max(1, schedule.steps(schedule.ramp, total_steps))
