"""BackSlash: rate-constrained training, as a regularizer beside an optimizer or as nodes of a training graph."""

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from ggpass.training import RateSettings, Regularizer


@dataclass(frozen=True)
class BackSlash(RateSettings):
    """min D(θ) + λ·R(θ), R the bits of the weights under a generalized Gaussian fitted to each tensor.

    After "BackSlash: Rate Constrained Optimized Training of Large Language Models" (arXiv 2504.16968), with a proximal
    step, a slope in true bits, and λ that can follow a target. The fields are those of `RateSettings`.

    `attach(model, optimizer)` works beside any training loop: BackSlash(target_bits=1.5).attach(model, optimizer).
    """

    def attach(self, model: nn.Module, *optimizers: Optimizer) -> Regularizer:
        """Regularize a model's matrices at every step of its optimizer.

        Args:
            model: any module; its Parameters stay its own.
            optimizers: those that train it, usually one.

        Returns:
            The attached Regularizer: `status()`, `bits()`, `state_dict()`, `detach()`.

        Raises:
            WeightError: nothing to regularize, or a pattern that matches nothing.
            InputError: the optimizers hold none of the weights, or the settings do not fit the model.
        """
        return Regularizer(model, self).attach(*optimizers)
