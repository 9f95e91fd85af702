"""w = Δ·round(θ/Δ): a model that runs on the grid it will be stored on, while exact weights θ go on being trained."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ggpass.errors import InputError
from ggpass.training.sharded import local_part


class ExactWeights:
    """The exact weights θ of Parameters that hold Δ·round(θ/Δ) between optimizer steps.

    The gradient is taken at the rounded weights and steps the exact ones (straight-through estimator: Bengio, Léonard
    & Courville 2013, arXiv 1308.3432), so that training makes up for the rounding.
    A Parameter is one of these from its first `round_` on. What is kept costs one more copy of the weights.

    Attributes:
        tensors: name -> θ, as the Parameter: its dtype, its device, its sharding.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @torch.no_grad()
    def restore_(self, weights: Iterable[tuple[str, nn.Parameter]]) -> None:
        """w ← θ, ahead of an optimizer's step; weights that were never rounded stay."""
        for name, weight in weights:
            if name in self.tensors:
                local_part(weight).copy_(local_part(self.tensors[name]))

    @torch.no_grad()
    def round_(self, weights: Iterable[tuple[str, nn.Parameter]], step: float) -> None:
        """θ ← w, then w ← Δ·round(w/Δ), ties to even, in float32, or float64 where the weight is."""
        for name, weight in weights:
            if name not in self.tensors:
                self.tensors[name] = weight.detach().clone()
            here, kept = local_part(weight.detach()), local_part(self.tensors[name])
            kept.copy_(here)
            wide = here.to(torch.promote_types(here.dtype, torch.float32), copy=True)
            here.copy_(wide.div_(step).round_().mul_(step))

    def load(self, tensors: Mapping[str, Tensor], weights: Mapping[str, nn.Parameter]) -> None:
        """Continue with θ that were saved.

        Raises:
            InputError: a name that is none of the weights', or another shape.
        """
        for name, tensor in tensors.items():
            if name not in weights or weights[name].shape != tensor.shape:
                raise InputError(
                    f"the state holds exact weights of {name} of shape {tuple(tensor.shape)}, which the model has not; "
                    "load the state that was saved with the same model"
                )
        self.tensors = {
            name: tensor.detach().clone().to(device=weights[name].device, dtype=weights[name].dtype)
            for name, tensor in tensors.items()
        }
