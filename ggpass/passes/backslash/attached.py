"""A Regularizer and those it is attached to: the steps of optimizers seen from outside, Parameters, the model."""

import gc
import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary

from ggpass.errors import InputError
from ggpass.passes.backslash.sharded import is_distributed


def learning_rates(optimizers: Iterable[Optimizer], weights: Sequence[nn.Parameter]) -> dict[int, float]:
    """id(Parameter) -> lr of its own param group, of those of the weights that the optimizers hold."""
    wanted = {id(weight) for weight in weights}
    return {
        id(parameter): float(group["lr"])
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        if id(parameter) in wanted
    }


def skipped(optimizer: Optimizer) -> bool:
    """Return True if a gradient scaler found infinities, so that this step changes nothing; asked in a step's hook.

    A GradScaler does not call `step()` of most optimizers then, and no hook runs. A fused one it calls all the same,
    with `found_inf` set while the call lasts: its kernel does nothing, and the hooks run. Reading it waits for the
    device, as GradScaler itself does for other optimizers.
    """
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def gradient_scale(optimizer: Optimizer) -> float:
    """By what the gradients that a fused optimizer is about to read are multiplied, for it to divide by; else 1."""
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def after_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], callback: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments of `step(closure)` with a closure that also calls back, once its gradients are there.

    Args:
        args, kwargs: those of a step's hook; None is returned if they hold no closure.
        callback: called within the step.
    """
    inner = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if inner is None:
        return None

    def closure() -> Any:
        loss = inner()
        callback()
        return loss

    return (args, {**kwargs, "closure": closure}) if "closure" in kwargs else ((args[0], closure, *args[2:]), kwargs)


#: Parameter -> the attached Regularizers that hold it, weakly.
_ATTACHED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def owners_of(weight: nn.Parameter) -> list[Any]:
    """Return the attached Regularizers that act on a weight."""
    return list(_ATTACHED.get(weight, ()))


def enter(owner: Any, names: Sequence[str], weights: Sequence[nn.Parameter], stepped: Container[int]) -> list[str]:
    """Note that `owner` acts on these weights from now on; one that was attached by itself (`automatic`) gives way.

    Args:
        owner: a Regularizer.
        names, weights: that it acts on.
        stepped: ids of the weights that its optimizers hold.

    Returns:
        Warnings: of weights that no optimizer steps, and of those on which another Regularizer acts.
    """
    if any(map(owners_of, weights)):
        gc.collect()  # an abandoned one is held by its own optimizer's hooks: a cycle that waits for the collector
    for other in {other for weight in weights for other in owners_of(weight)}:
        if other.automatic:
            other.detach(finished=False)
    found = []
    idle = [name for name, weight in zip(names, weights) if id(weight) not in stepped]
    if idle:
        found.append(
            f"{len(idle)} of {len(names)} weights are in none of the optimizers ({some(idle)}): they count in the "
            "bits, and the others make up for them; freeze them first, or skip= them"
        )
    held = [name for name, weight in zip(names, weights) if owners_of(weight)]
    if held:
        found.append(
            f"{some(held)}: another Regularizer is attached to these weights, and the rate of both acts; detach() it, "
            "or skip= these weights in one"
        )
    for weight in weights:
        _ATTACHED.setdefault(weight, weakref.WeakSet()).add(owner)
    return found


def leave(owner: Any, weights: Iterable[nn.Parameter]) -> None:
    """Note that it acts no more."""
    for weight in weights:
        if weight in _ATTACHED:
            _ATTACHED[weight].discard(owner)


def some(names: Sequence[str]) -> str:
    """Return the first three."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def check_parameters(model: nn.Module | None, weights: Sequence[nn.Parameter]) -> None:
    """Raise InputError if a model has replaced a weight ahead of attach."""
    if model is not None and not {id(weight) for weight in weights} <= {id(p) for p in model.parameters()}:
        raise InputError(
            "the model's Parameters were replaced since this Regularizer was made, as sharding does; make it and the "
            "optimizer after fully_shard"
        )


def check_still_there(model: nn.Module | None, names: Sequence[str], weights: Sequence[nn.Parameter]) -> None:
    """Raise InputError if a model has replaced a weight since: tying does, and its bits would count a dead tensor.

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
