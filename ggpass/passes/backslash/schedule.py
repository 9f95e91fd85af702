"""m(t): how the strength of the rate rises, holds and ends over a training run."""

from dataclasses import dataclass

from ggpass.errors import InputError

Span = int | float


@dataclass(frozen=True)
class Schedule:
    """m(t) = t/W in the warm-up of W steps, then 1, then 0 in the fine-tune tail.

    A float is a share of all steps (0.1 is a tenth, and needs `total_steps`), an int a number of steps.

    Attributes:
        warm_up: the strength rises in a line from 0 over this span.
        ramp: with a target, the span in which the planned bits go from what is measured to the target. What is left
            after it holds the target, while the learning rate decays.
        tail: the last span trains without the rate. Weights that are exactly zero when it begins stay zero, so that
            the bits won do not leak away.
        on_grid: in this last span the model runs on the grid: it holds Δ·round(θ/Δ), and what is stepped are exact
            weights beside it, so that training makes up for the rounding. The trained model is on the grid; averages
            of its weights (EMA, SWA) are not.
    """

    warm_up: Span = 0
    ramp: Span = 0.6
    tail: Span = 0
    on_grid: Span = 0

    def __post_init__(self) -> None:
        for name, span in vars(self).items():
            share = isinstance(span, float)
            if isinstance(span, bool) or not isinstance(span, int | float) or not span >= 0 or (share and span > 1):
                raise InputError(
                    f"{name}={span!r}: give a share of all steps as a float from 0.0 to 1.0, or a number of steps as "
                    "an int"
                )

    def check(self, total_steps: int | None, ramps: bool) -> None:
        """Raise InputError if a share has no whole, or the spans do not fit into the training.

        Args:
            total_steps: optimizer steps in all.
            ramps: whether there is a target, so that the ramp counts.
        """
        if total_steps is None:
            for name, span in vars(self).items():
                if span and name != "ramp" and (isinstance(span, float) or name != "warm_up"):
                    raise InputError(f"{name}={span!r} needs total_steps=, the number of optimizer steps in all")
            return
        tail = self.steps(self.tail, total_steps)
        if self.steps(self.warm_up, total_steps) + tail > total_steps:
            raise InputError(
                f"warm_up={self.warm_up!r} and tail={self.tail!r} are longer than total_steps={total_steps}"
            )
        if ramps and tail and self.steps(self.ramp, total_steps) + tail > total_steps:
            raise InputError(
                f"ramp={self.ramp!r} is not over when tail={self.tail!r} begins, so that the target would be missed by "
                f"far; shorten one of them in the schedule (total_steps={total_steps})"
            )

    @staticmethod
    def steps(span: Span, total_steps: int | None) -> int:
        """Return a span in optimizer steps; a share without a whole is taken of 1000 steps."""
        return span if isinstance(span, int) else round(span * (1000 if total_steps is None else total_steps))

    def factor(self, step: int, total_steps: int | None) -> float:
        """m(step), step counted from 0."""
        if self.in_tail(step, total_steps):
            return 0.0
        warm_up = self.steps(self.warm_up, total_steps)
        return min(1.0, (step + 1) / (warm_up + 1))

    def in_tail(self, step: int, total_steps: int | None) -> bool:
        """Return True if `step` belongs to the fine-tune tail."""
        return total_steps is not None and step >= total_steps - self.steps(self.tail, total_steps)

    def on_grid_after(self, step: int, total_steps: int | None) -> bool:
        """Return True if the model is on the grid once `step` is done; the last step of all ends there."""
        return (
            total_steps is not None
            and step + 1 >= total_steps - self.steps(self.on_grid, total_steps)
            and (self.on_grid != 0)
        )
