"""A Regularizer's state is of the weights that it names: by name, in order, with their shapes."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor

from ggpass.errors import InputError
from ggpass.passes.backslash.settings import RateSettings

#: The prefixes that wrappers give to a model's names: torch.compile, and DDP.
WRAPPERS = ("_orig_mod.", "module.")


def plain_name(name: str) -> str:
    """Return a weight's name without the wrappers' prefixes at its front."""
    while wrapper := next((w for w in WRAPPERS if name.startswith(w)), ""):
        name = name.removeprefix(wrapper)
    return name


def tensors_of(names: Sequence[str], weights: Sequence[Tensor]) -> list[list[Any]]:
    """Return [name, shape] of each weight: plain lists, for a state."""
    return [[plain_name(name), list(weight.shape)] for name, weight in zip(names, weights)]


def check_state(
    state: Mapping[str, Any], names: Sequence[str], weights: Sequence[Tensor], settings: RateSettings
) -> None:
    """Raise InputError if a state is of other weights or of another kind of goal; it names the first difference.

    So it does if the model was on its grid and the exact weights are missing: the training would go on from rounded
    ones.
    """
    has_target, steps = settings.has_target, int(state.get("steps", 0))
    action = "load the state that was saved with the same model and settings"
    for key in ("steps", "fits", "tensors", "course"):
        if key not in state:
            raise InputError(f"the state has no {key!r}: it is not of a Regularizer, or of an older one; {action}")
    if ("controller" in state) != has_target:
        kinds = ("a target", "a given strength")
        raise InputError(
            f"the state is of a training with {kinds['controller' not in state]}, these settings are of one with "
            f"{kinds[not has_target]}; {action}"
        )
    if steps and settings.schedule.on_grid_after(steps - 1, settings.total_steps) and not state.get("exact_weights"):
        raise InputError(
            f"the model was on its grid after {steps} steps, and the state has no exact_weights. "
            "torch.distributed.checkpoint loads only what the dict that it is given names: put "
            "exact_weights={name: torch.empty_like(weight)} of all regularized weights into it"
        )
    found, wanted = (
        [f"{name} of shape {tuple(shape)}" for name, shape in rows]
        for rows in (state["tensors"], tensors_of(names, weights))
    )
    for number, (there, here) in enumerate(zip_longest(found, wanted, fillvalue="missing")):
        if there != here:
            raise InputError(f"weight {number} is {there} in the state, and {here} in the model; {action}")
