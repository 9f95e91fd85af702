"""Facts of an optimizer's step, seen from outside: learning rates, closures, gradient scales, steps that AMP skips."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer


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


def has_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return True if `step(closure)` was called: its gradients come to be inside the step. `args` are those of a hook."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None) is not None


def after_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], callback: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of `step(closure)` with a closure that also calls back, once its gradients are there."""
    inner = kwargs["closure"] if "closure" in kwargs else args[1]

    def closure() -> Any:
        loss = inner()
        callback()
        return loss

    return (args, {**kwargs, "closure": closure}) if "closure" in kwargs else ((args[0], closure, *args[2:]), kwargs)
