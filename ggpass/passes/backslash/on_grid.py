"""w = Δ·round(θ/Δ): a model that runs on the grid it will be stored on, while exact weights θ go on being trained."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ggpass.errors import InputError
from ggpass.ggd.grid import on_grid
from ggpass.passes.backslash.sharded import local_part


class ExactWeights:
    """The exact weights θ of Parameters that hold Δ·round(θ/Δ) between optimizer steps.

    The gradient is taken at the rounded weights and steps the exact ones (straight-through estimator: Bengio, Léonard
    & Courville 2013, arXiv 1308.3432), so that training makes up for the rounding.
    A Parameter is one of these from its first `round_` on. What is kept costs one more copy of the weights.
    What others write into a Parameter between steps (`load_state_dict`, a mask, swapped averages) counts: if it is
    no longer the rounded θ, it is the θ of the next step.

    Attributes:
        tensors: name -> θ, as the Parameter: its dtype, its device, its sharding.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @torch.no_grad()
    def restore_(self, weights: Iterable[tuple[str, nn.Parameter, float]]) -> None:
        """w ← θ if w is Δ·round(θ/Δ), ahead of an optimizer's step; weights that were never rounded stay.

        Args:
            weights: name, Parameter and Δ of each.
        """
        for name, weight, step in weights:
            if name in self.tensors:
                here = local_part(weight.detach())
                kept = local_part(self.tensors[name]).to(here.device)
                # Written by others since: θ there is of weights that are gone.
                here.copy_(torch.where(here == on_grid(kept, step).to(here.dtype), kept.to(here.dtype), here))

    @torch.no_grad()
    def round_(self, weights: Iterable[tuple[str, nn.Parameter, float]]) -> None:
        """θ ← w, then w ← Δ·round(w/Δ), ties to even, in float32, or float64 if the weight is.

        Args:
            weights: name, Parameter and Δ of each.
        """
        for name, weight, step in weights:
            if name not in self.tensors:
                self.tensors[name] = weight.detach().clone()
            here, kept = local_part(weight.detach()), local_part(self.tensors[name])
            kept.copy_(here)
            here.copy_(on_grid(here, step))

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
