"""What the callbacks share: settings whose number of steps the trainer knows, and figures to log."""

import dataclasses
import math
from typing import Any

from torch import nn
from torch.optim import Optimizer

from ggpass.errors import InputError
from ggpass.passes.backslash import BackSlash
from ggpass.training import RateSettings, Regularizer, Schedule

#: Stands for the trainer's number of steps while that is unknown, so that everything else can be checked at once.
UNKNOWN_STEPS = 1 << 62


class Attachment:
    """Settings now, a Regularizer when the trainer starts.

    Attributes:
        settings: as given; `total_steps` is UNKNOWN_STEPS where it was left out.
        regularizer: the last one attached; it stays readable after the training. None before the first.
    """

    def __init__(self, settings: RateSettings | None, fields: dict[str, Any]) -> None:
        """Check the settings.

        Args:
            settings: a BackSlash or RateSettings; None where the fields are given one by one.
            fields: of BackSlash. A share in a schedule is taken of the trainer's steps.

        Raises:
            InputError: both or neither given, or values that cannot be meant.
        """
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

    def attach(self, model: nn.Module, optimizers: list[Optimizer], total_steps: int | None) -> Regularizer:
        """Attach a new Regularizer, in place of the one before.

        Args:
            model: with the Parameters that the optimizers hold: after sharding, if it is sharded.
            optimizers: those that step, not what wraps them.
            total_steps: optimizer steps in the training; None where it has no end.

        Raises:
            WeightError, InputError: as `BackSlash.attach`.
        """
        self.detach()
        settings = self.settings
        if settings.total_steps == UNKNOWN_STEPS:
            settings = dataclasses.replace(settings, total_steps=total_steps)
        self.regularizer = Regularizer(model, settings).attach(*optimizers)
        return self.regularizer

    def detach(self) -> None:
        """Take the hooks off the optimizer; the Regularizer and its state stay."""
        if self.regularizer is not None:
            self.regularizer.detach()

    def figures(self) -> dict[str, float]:
        """bits_per_weight, rate_strength (λ) and zeros (a share), as last measured; empty before the first time."""
        if self.regularizer is None:
            return {}
        state = self.regularizer.state_dict()
        if math.isnan(state["measured_bits"]):
            return {}
        return {
            "bits_per_weight": state["measured_bits"],
            "rate_strength": state["strength"],
            "zeros": state["measured_zeros"],
        }
