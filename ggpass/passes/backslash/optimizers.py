"""What a step of an optimizer tells from outside: learning rates, closures, the loss's scale, what AMP skipped."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from ggpass.errors import InputError


@dataclass(frozen=True)
class LossScale:
    """s/k: by what a caller multiplies the loss of each backward.

    Attributes:
        scaler: the gradient scaler, whose s is read each time; None for 1.
        micro_batches: k, at least 1.
    """

    scaler: GradScaler | None = None
    micro_batches: int = 1

    def __post_init__(self) -> None:
        if self.micro_batches < 1:
            raise InputError(f"micro_batches is a count of backwards in a step, at least 1, not {self.micro_batches!r}")

    def value(self, device: torch.device) -> float | Tensor:
        """A number, or a tensor on the device where the scaler's is: it multiplies there, and nothing waits for it."""
        share = 1 / self.micro_batches
        return share if self.scaler is None else self.scaler.scale(torch.tensor(share, device=device))


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
    """Whether a gradient scaler found infinities, so that this step changes nothing; asked in a step's hook.

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
    """Whether `step(closure)` was called: its gradients come to be inside the step. `args` are those of a hook."""
    return kwargs.get("closure", args[1] if len(args) > 1 else None) is not None


def after_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], act: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `step(closure)` with a closure that also acts, once its gradients are there, at every call."""
    inner = kwargs["closure"] if "closure" in kwargs else args[1]

    def closure() -> Any:
        loss = inner()
        act()
        return loss

    return (args, {**kwargs, "closure": closure}) if "closure" in kwargs else ((args[0], closure, *args[2:]), kwargs)
