"""Task: what is trained, on which rows, and how well it does; Recipe: how it is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn

from ggpass.training import RateSettings

Split = Literal["held_out", "test"]


@dataclass(frozen=True)
class Quality:
    """How well a model does on some rows.

    Attributes:
        score: what the task is about, larger is better: accuracy from 0 to 1, or −NLL.
        nll: mean negative log-likelihood, in nats.
    """

    score: float
    nll: float


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Attributes:
        name: for tables and files.
        build: seed -> a fresh model.
        epoch: generator -> the batches of one epoch.
        loss: (model, batch) -> the mean loss, a scalar.
        quality: (model, split) -> how well it does there.
        epochs: in a whole training.
        batches: in one epoch.
        lr, weight_decay: of AdamW, as tuned on held-out rows.
        measure: what the score is, in words.
        tolerance: how far the score may fall below AdamW's and still count as equal: absolute, or relative where
            the score is −NLL.
    """

    name: str
    build: Callable[[int], nn.Module]
    epoch: Callable[[Generator], Iterable[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    quality: Callable[[nn.Module, Split], Quality]
    epochs: int
    batches: int
    lr: float
    weight_decay: float
    measure: str = "accuracy"
    tolerance: float = 0.002

    @property
    def steps(self) -> int:
        """Optimizer steps in a whole training."""
        return self.epochs * self.batches

    def threshold(self, score: float) -> float:
        """The least score that counts as equal to another."""
        return score * (1 + self.tolerance) if self.measure == "−NLL" else score - self.tolerance


@dataclass(frozen=True)
class Recipe:
    """AdamW with a one-cycle schedule, and perhaps a rate beside it.

    Attributes:
        weight_decay: on matrices; None: the task's.
        lr: None: the task's.
        rate: settings of BackSlash, `total_steps` left out.
    """

    weight_decay: float | None = None
    lr: float | None = None
    rate: RateSettings | None = None


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The weights that are regularized, quantized and counted: all Parameters of two dimensions and more, once."""
    return [parameter for parameter in model.parameters() if parameter.dim() >= 2]


def rows(count: int, size: int, generator: Generator) -> Iterator[Tensor]:
    """Indices of one epoch's batches; the last incomplete batch is left out."""
    order = torch.randperm(count, generator=generator)
    for start in range(0, count - size + 1, size):
        yield order[start : start + size]
