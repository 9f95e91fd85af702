"""RateSettings: the settings of a training with a rate term, as one checked value."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from ggpass.errors import InputError
from ggpass.graph.weights import as_patterns
from ggpass.passes.backslash.schedule import Schedule

Mode = Literal["proximal", "coupled", "paper-coupled", "paper-code"]

#: λ of the published decoupled update, if nothing else is asked.
PAPER_CODE_STRENGTH = 2000.0


@dataclass(frozen=True)
class RateSettings:
    """min D(θ) + λ·R(θ): how the bits R of the weights join the task's loss D in training.

    R is the rate of each weight under the generalized Gaussian (ν, α) of its own tensor, so its slope is in bits per
    unit of weight: ρ'(θ) = ν/(α^ν ln 2)·(|θ| + ε)^(ν−1).

    Attributes:
        strength: λ, in loss per bit. One step of the proximal mode shrinks a weight by lr·λ·m(t)·ρ'(|θ|). In the
            paper's modes it is their λ (2000 in the published code).
        target_bits: zero-order entropy to reach, in bits a weight, pooled over all regularized weights on the grid
            `step`; λ of the proximal mode then follows by itself. Exactly one of strength, target_bits and
            target_megabytes is given, or none with mode="paper-code".
        target_megabytes: the same as a size of the whole model in 10^6 bytes: regularized weights at their entropy,
            every other tensor as it is.
        step: Δ of that grid, in units of weight.
        spread: γ from 0 to 1. Above 0 each weight tensor has a grid of its own, Δ_i = Δ·(ḡ/g_i)^γ, g_i = √E[gradient²]
            in the last steps ahead of `schedule.on_grid` and ḡ the geometric mean over all weights: embeddings and
            heads, which a loss feels most, get finer grids than inner layers. `Regularizer.grid_steps` tells them.
            The proximal step is scaled by Δ_i/Δ, and if ε is `step` it is Δ_i.
        mode: "proximal": after the optimizer's step, θ ← sign(θ)·max(|θ| − lr·λ·m·ρ'(|θ|), 0): exact zeros appear.
            "coupled": λ·m·ρ'(|θ|)·sign(θ) joins the gradient before the optimizer's step.
            "paper-coupled": arXiv 2504.16968, Algorithm 1: λ·ν/N·sign(θ)(|θ|+ε)^(ν−1) joins the gradient, one ν for
            all weights, from their pooled moments before every step; N is the number of regularized weights.
            "paper-code": the published decoupled update: after the optimizer's step
            θ −= λ·ν/N·sign(θ)(|θ|+1)^(ν−1), one ν as above, no learning rate.
        shape_max: ν is held at or below this. A fresh layer is uniform and fits ν = 3, whose rate would crush its
            large weights. The paper's modes take ν as it is fitted.
        shape: a fixed ν instead of the fitted one. shape=1, scale=1/ln 2 is proximal L1: θ ← soft(θ, lr·λ).
        scale: a fixed α, in units of weight, instead of the fitted one.
        epsilon: ε > 0 in the slope, in units of weight; None: `step` (in "paper-coupled" too), and 1 in "paper-code".
        refit_every: optimizer steps between fits of ν and α, measurements of the bits, and moves of λ; None: 20, or a
            hundredth of total_steps if that is less.
        schedule: warm-up, ramp and fine-tune tail.
        total_steps: optimizer steps in the whole training; shares in the schedule need it, and a target lands better.
        only: patterns; if there are any, a weight must match one. A shell pattern on its name, or a module's name.
        skip: patterns of weights to leave alone; stronger than `only`.

    Raises:
        InputError: values that cannot be meant, or that contradict each other.
    """

    strength: float | None = None
    target_bits: float | None = None
    target_megabytes: float | None = None
    step: float = 2.0**-6
    spread: float = 0.0
    mode: Mode = "proximal"
    shape_max: float = 1.0
    shape: float | None = None
    scale: float | None = None
    epsilon: float | None = None
    refit_every: int | None = None
    schedule: Schedule = field(default_factory=Schedule)
    total_steps: int | None = None
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("only", "skip"):
            object.__setattr__(self, name, as_patterns(getattr(self, name)))
        if self.mode not in get_args(Mode):
            raise InputError(f"mode={self.mode!r} is unknown; choose one of {', '.join(get_args(Mode))}")
        self._check_numbers()
        self._check_goal()
        if self.is_paper and (self.shape is not None or self.scale is not None):
            raise InputError(f"mode={self.mode!r} fits ν itself and has no scale; leave shape= and scale= out")
        for name in ("refit_every", "total_steps"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is a count of optimizer steps, at least 1, not {value!r}")
        self.schedule.check(self.total_steps, self.has_target)

    def _check_numbers(self) -> None:
        for name in ("target_bits", "target_megabytes", "step", "shape_max", "shape", "scale"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} is a positive number, not {value!r}")
        if not (isinstance(self.spread, int | float) and 0 <= self.spread <= 1):
            raise InputError(f"spread is a number from 0 (one grid for all) to 1, not {self.spread!r}")
        for name in ("strength", "epsilon"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} is a number of at least 0, not {value!r}")

    def _check_goal(self) -> None:
        goals = [n for n in ("strength", "target_bits", "target_megabytes") if getattr(self, n) is not None]
        if not goals and self.mode == "paper-code":
            object.__setattr__(self, "strength", PAPER_CODE_STRENGTH)
        elif len(goals) != 1:
            given = " and ".join(goals) or "none"
            raise InputError(f"give exactly one of strength, target_bits and target_megabytes; {given} given")
        elif self.strength is None and self.mode != "proximal":
            raise InputError(
                f"{goals[0]} is reached by the proximal step, whose bits can be forecast; give strength= with "
                f"mode={self.mode!r}, or leave mode out"
            )

    @property
    def interval(self) -> int:
        """Optimizer steps between fits: `refit_every`, or what stands for None."""
        return self.refit_every or min(20, max(1, (self.total_steps or 2000) // 100))

    @property
    def has_target(self) -> bool:
        """Return True if λ follows a target."""
        return self.strength is None

    @property
    def slope_epsilon(self) -> float:
        """Return the ε in force."""
        if self.epsilon is not None:
            return self.epsilon
        return 1.0 if self.mode == "paper-code" else self.step

    @property
    def is_paper(self) -> bool:
        """Return True if the slope is the paper's, ν/N·(|θ|+ε)^(ν−1), with one ν for all weights."""
        return self.mode.startswith("paper")
