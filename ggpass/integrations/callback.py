"""The part of a callback that no trainer changes: settings, the Regularizer, its state in checkpoints, its figures."""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ggpass.errors import InputError
from ggpass.passes.backslash import BackSlash
from ggpass.passes.backslash.regularizer import Regularizer
from ggpass.passes.backslash.schedule import Schedule
from ggpass.passes.backslash.settings import RateSettings
from ggpass.passes.backslash.state import plain_name

log = logging.getLogger(__name__)

#: Stands for the trainer's number of steps while that is unknown, so that everything else can be checked at once.
UNKNOWN_STEPS = 1 << 62


class RateCallback:
    """Settings now, a Regularizer when the trainer starts.

    Attributes:
        settings: as given; `total_steps` is UNKNOWN_STEPS if it was left out.
        regularizer: of the current or the last training; it stays readable after it. None before the first.
        first_step: the trainer's step at which the rate began.
    """

    def __init__(self, settings: RateSettings | None = None, **fields: Any) -> None:
        """Check the settings; nothing is attached before the training begins.

        Args:
            settings: a `BackSlash`, or:
            fields: its fields, one by one. A share in a schedule is taken of the trainer's steps.

        Raises:
            InputError: both or neither given, or values that cannot be meant.
        """
        super().__init__()
        if (settings is None) == (not fields):
            raise InputError("give either a BackSlash or its fields: BackSlashCallback(target_bits=1.5)")
        if settings is None:
            if isinstance(fields.get("schedule"), dict):  # as a checkpoint holds it
                fields = {**fields, "schedule": Schedule(**fields["schedule"])}
            settings = BackSlash(**{"total_steps": UNKNOWN_STEPS, **fields})
        elif not isinstance(settings, RateSettings):
            raise InputError(f"settings is a BackSlash or RateSettings, not {type(settings).__name__}")
        elif settings.total_steps is None:
            settings = dataclasses.replace(settings, total_steps=UNKNOWN_STEPS)
        self.settings = settings
        self.regularizer: Regularizer | None = None
        self.first_step = 0

    def start(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        *,
        step: int,
        last_step: int | None,
        saved: Mapping[str, Any] | None,
        who: str,
        rate_of: Callable[[dict[str, nn.Parameter]], Mapping[str, Any]] | None = None,
    ) -> None:
        """Attach a new Regularizer, in place of the one before, and continue from a checkpoint.

        Args:
            model: with the Parameters that the optimizers hold: after sharding, if it is sharded.
            optimizers: those that step, not what wraps them.
            step: the trainer's step, above 0 if it resumes.
            last_step: at which the trainer ends; None if that is unknown.
            saved: from `saved_state()`, in the checkpoint that is resumed from; None if it holds none.
            who: the name under which a checkpoint holds the state.
            rate_of: gives the Regularizer's state for weights by name, if `saved["rate"]` is not the whole of it.

        Raises:
            WeightError, InputError: as `BackSlash.attach` and `Regularizer.load_state_dict`.
        """
        self.detach(finished=False)
        self.first_step = int(saved["first_step"]) if saved else step
        settings = self.settings
        if settings.total_steps == UNKNOWN_STEPS:
            total = None if last_step is None else max(1, last_step - self.first_step)
            settings = dataclasses.replace(settings, total_steps=total)
        regularizer = Regularizer(model, settings)
        if saved:
            weights = {plain_name(name): weight for name, weight in zip(regularizer.names, regularizer.weights)}
            regularizer.load_state_dict(saved["rate"] if rate_of is None else rate_of(weights))
        elif step:
            log.warning("the checkpoint of step %d holds no state of %s: the rate begins with this step", step, who)
        self.regularizer = regularizer.attach(*optimizers)

    def detach(self, *, finished: bool = True) -> None:
        """Take the hooks off the optimizer; the Regularizer and its state stay.

        Args:
            finished: whether the training is over; not if it broke off.
        """
        if self.regularizer is not None:
            self.regularizer.detach(finished=finished)

    def saved_state(self) -> dict[str, Any] | None:
        """Return a checkpoint's state: the trainer's step at which the rate began, and the Regularizer's."""
        if self.regularizer is None:
            return None
        return {"first_step": self.first_step, "rate": self.regularizer.state_dict()}

    def figures(self) -> dict[str, float]:
        """Return bits_per_weight, rate_strength (λ) and zeros (a share), as last measured; empty before."""
        names = {"measured_bits": "bits_per_weight", "strength": "rate_strength", "measured_zeros": "zeros"}
        state = {} if self.regularizer is None else self.regularizer.state_dict()
        measured = not math.isnan(state.get("measured_bits", math.nan))
        return {name: state[key] for key, name in names.items()} if measured else {}
