"""The remaps that are compared, and the shapes they leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import ggpass
from ggpass.ggd import fit_moments


@dataclass(frozen=True)
class Way:
    """One remap.

    Attributes:
        name: for the table.
        options: of `ggpass.shape_`; None remaps nothing, and shows what the fine-tuning does by itself.
    """

    name: str
    options: dict[str, Any] | None = field(default_factory=dict)

    def apply(self, model: nn.Module) -> tuple[float, float]:
        """Remap a model in place.

        Returns:
            The mean ν before and after over all matrices, each weight counted once.
        """
        before = mean_shape(model)
        if self.options is not None:
            ggpass.shape_(model, **self.options)
        return before, mean_shape(model)


COMPENSATED = {"mode": "compensated", "granularity": "tensor"}

CONTROL = Way("none", None)
PUBLISHED = Way("paper, model (published defaults)")
PUBLISHED_ALL = Way("paper, model, rare = 0", {"rare": 0})
OWN = Way("compensated, tensor", COMPENSATED)
OWN_ALL = Way("compensated, tensor, rare = 0", {**COMPENSATED, "rare": 0})


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """All Parameters of two dimensions and more, once."""
    return [parameter for parameter in model.parameters() if parameter.dim() >= 2]


def mean_over(model: nn.Module, figure: Callable[[nn.Parameter], float]) -> float:
    """Σ size·figure / Σ size over the matrices."""
    weights = weights_of(model)
    return sum(w.numel() * figure(w) for w in weights) / sum(w.numel() for w in weights)


def mean_shape(model: nn.Module) -> float:
    """Mean ν of the moment fits."""
    return mean_over(model, lambda weight: fit_moments(weight.detach()).shape)
