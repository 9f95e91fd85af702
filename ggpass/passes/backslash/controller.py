"""λ from bits: drop(λ) = ln(planned / measured) − growth, the strength that keeps measured bits on a plan."""

import math
from collections.abc import Callable
from dataclasses import dataclass

#: The share of a miss that is to be made up by the next measurement; all of it would chase noise.
CORRECTION = 0.5

#: How fast the observed growth is followed: the weight of the newest interval in its running mean.
FOLLOW = 0.3

#: A miss of the target by this share is not reported.
TOLERANCE = 0.03

#: Measurements in a row that show that a target needs no rate, and not that it was overshot a little.
PATIENCE = 10

#: |ln(bits after / bits before)| that λ may bring about from one measurement to the next, beside undoing the growth.
LARGEST_DROP = 0.2


@dataclass
class Controller:
    """Brings the bits from where they are first measured to a target, and holds them there.

    From one measurement to the next, the training itself changes the bits by some factor (they grow: the loss pulls
    weights out of zero) and the rate shrinks them by a factor that can be forecast for any λ from the weights
    themselves. What was measured but not forecast is the growth; λ is what undoes the growth and follows the plan.
    Since the forecast knows the learning rate, the plan is still followed while it decays.

    Attributes:
        target: bits a weight.
        ramp: steps in which the plan goes from the start to the target, by equal factors.
        start_bits, start_step: the first measurement, and when it was.
        growth: running mean of ln(bits measured / bits forecast) of an interval.
        rate: learning rate at the last measurement, in the mean over the weights. The growth is taken to be
            proportional to it: as the rate decays, a λ for yesterday's growth would overshoot, and few bits come back.
        forecast: bits expected at the next measurement but for growth; NaN before the first.
        idle: measurements in a row at which the target needed no rate.
        first_bits: the first measurement itself; `start_bits` is at least the target.
        hurried: measurements from which the plan wanted more than LARGEST_DROP.
    """

    target: float
    ramp: int
    start_bits: float = math.nan
    start_step: int = 0
    growth: float = 0.0
    rate: float = 0.0
    forecast: float = math.nan
    idle: int = 0
    first_bits: float = math.nan
    hurried: int = 0

    @property
    def began_below(self) -> bool:
        """Return True if there were fewer bits than asked for from the start."""
        return self.first_bits < (1 - TOLERANCE) * self.target

    def misses(self, bits: float) -> bool:
        """Return True if bits a weight are so far from the target that it is worth a message."""
        return not abs(bits - self.target) <= TOLERANCE * self.target

    def planned(self, step: int) -> float:
        """Return the bits that the plan wants at a step."""
        done = min(1.0, (step - self.start_step) / max(1, self.ramp))
        return float(self.start_bits ** (1 - done) * self.target**done)

    def needed_drop(self, step: int, next_step: int, bits: float, rate: float = 1.0) -> float:
        """ln of the factor that the rate is to apply to the bits until the next measurement; at most 0.

        Args:
            step: optimizer steps so far.
            next_step: when the bits are measured next.
            bits: measured now, a weight.
            rate: learning rate now, in the mean over the weights.
        """
        if math.isnan(self.start_bits):
            self.start_bits, self.start_step, self.first_bits = max(bits, self.target), step, bits
        elif bits > 0 and self.forecast > 0:
            self.growth += FOLLOW * (math.log(bits / self.forecast) - self.growth)
            self.growth *= min(2.0, rate / self.rate) if self.rate > 0 else 1.0
        self.rate = rate
        if bits <= 0:
            return 0.0
        now, then = self.planned(step), self.planned(next_step)
        wanted = math.log(then / now) + CORRECTION * math.log(now / bits)
        self.hurried += wanted < -LARGEST_DROP
        return min(0.0, max(-LARGEST_DROP, wanted) - max(-LARGEST_DROP, min(2 * LARGEST_DROP, self.growth)))

    def surplus(self, step: int, bits: float, strength: float) -> str:
        """Return the message that a target needs no rate, long after the plan has ended; once at most, else ''."""
        idle = strength == 0 and bits < (1 - TOLERANCE) * self.target and step >= self.start_step + self.ramp
        self.idle = self.idle + 1 if idle else 0
        if self.idle != PATIENCE:
            return ""
        return f"this training yields {bits:.2f} bits a weight at λ = 0, fewer than the target of {self.target:.2f}"

    @property
    def reported_surplus(self) -> bool:
        """Return True if that was reported, and is still so."""
        return self.idle >= PATIENCE


def solve(drop_of: Callable[[float], float], drop: float, largest: float) -> float:
    """λ in [0, largest] with drop_of(λ) = drop, by regula falsi in the Illinois form.

    Args:
        drop_of: falls from 0 at λ = 0.
        drop: at most 0.
        largest: taken if even its drop is too small.

    Returns:
        λ whose drop misses the wanted one by at most 2 % of it; the last one tried if 24 tries are not enough.
    """
    if drop >= 0 or largest <= 0:
        return 0.0
    low, high = 0.0, largest
    below, above = -drop, drop_of(largest) - drop
    if above >= 0:
        return largest
    middle = high
    for _ in range(24):
        middle = (low * above - high * below) / (above - below)
        miss = drop_of(middle) - drop
        if abs(miss) <= 0.02 * -drop:
            break
        if miss > 0:
            low, below, above = middle, miss, above / 2
        else:
            high, above, below = middle, miss, below / 2
    return middle
