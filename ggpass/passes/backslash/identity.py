"""Whether weights are still the model's, and whether a state is of the same weights: by name, shape and object."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ggpass.errors import InputError
from ggpass.passes.backslash.settings import RateSettings
from ggpass.passes.backslash.sharded import is_distributed

#: What wrappers put in front of a model's names: torch.compile, and DDP.
WRAPPERS = ("_orig_mod.", "module.")


def plain_name(name: str) -> str:
    """A weight's name without the wrappers' prefixes at its front."""
    while wrapper := next((w for w in WRAPPERS if name.startswith(w)), ""):
        name = name.removeprefix(wrapper)
    return name


def tensors_of(names: Sequence[str], weights: Sequence[Tensor]) -> list[list[Any]]:
    """[name, shape] of each weight: plain lists, for a state."""
    return [[plain_name(name), list(weight.shape)] for name, weight in zip(names, weights)]


def check_state(
    state: Mapping[str, Any], names: Sequence[str], weights: Sequence[Tensor], settings: RateSettings
) -> None:
    """Raise InputError where a state is of other weights or of another kind of goal; it names the first difference.

    So it does where the model was on its grid and the exact weights are missing: the training would go on from rounded
    ones.
    """
    has_target, steps = settings.has_target, int(state.get("steps", 0))
    action = "load the state that was saved with the same model and settings"
    for key in ("steps", "fits", "tensors", "course"):
        if key not in state:
            raise InputError(f"the state has no {key!r}: it is none of a Regularizer, or of an older one; {action}")
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
    found, wanted = [(n, tuple(s)) for n, s in state["tensors"]], [(n, tuple(s)) for n, s in tensors_of(names, weights)]
    for number in range(max(len(found), len(wanted))):
        there, here = (_words(rows, number) for rows in (found, wanted))
        if there != here:
            raise InputError(f"weight {number} is {there} in the state, and {here} in the model; {action}")


def _words(rows: Sequence[tuple[str, tuple[int, ...]]], number: int) -> str:
    return f"{rows[number][0]} of shape {rows[number][1]}" if number < len(rows) else "missing"


def check_of(model: nn.Module | None, weights: Sequence[nn.Parameter]) -> None:
    """Raise InputError where a model has replaced a weight ahead of attach."""
    if model is not None and not {id(weight) for weight in weights} <= {id(p) for p in model.parameters()}:
        raise InputError(
            "the model's Parameters were replaced since this Regularizer was made, as sharding does; make it and the "
            "optimizer after fully_shard"
        )


def check_still_of(model: nn.Module | None, names: Sequence[str], weights: Sequence[nn.Parameter]) -> None:
    """Raise InputError where a model has replaced a weight since: tying does, and its bits would count a dead tensor.

    Sharded weights are not looked for: FSDP puts others in their place between a forward and a backward.
    """
    if model is None:
        return
    held = {id(parameter) for parameter in model.parameters()}
    for name, weight in zip(names, weights):
        if id(weight) not in held and not is_distributed(weight):
            raise InputError(
                f"{name} is no longer the model's: another Parameter took its place since attach, as tying weights "
                "does, or sharding; detach() and attach a new BackSlash after it, with an optimizer of the new ones"
            )
