"""Which Regularizers act on a Parameter: two rates on one weight are reported, and one attached by itself gives way."""

import gc
import weakref
from collections.abc import Container, Iterable, Sequence
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

#: Parameter -> the attached Regularizers that hold it, weakly, in the order of their attaching.
_ATTACHED: WeakIdKeyDictionary = WeakIdKeyDictionary()


def enter(owner: Any, weights: Iterable[nn.Parameter]) -> None:
    """Note that `owner` acts on these weights from now on."""
    for weight in weights:
        _ATTACHED.setdefault(weight, []).append(weakref.ref(owner))


def leave(owner: Any, weights: Iterable[nn.Parameter]) -> None:
    """Note that it acts no more."""
    for weight in weights:
        _ATTACHED[weight] = [r for r in _ATTACHED.get(weight, []) if r() is not None and r() is not owner]


def owners_of(weight: nn.Parameter) -> list[Any]:
    """Return the attached Regularizers that act on a weight."""
    return [owner for r in _ATTACHED.get(weight, []) if (owner := r()) is not None]


def warnings_at_attach(names: Sequence[str], weights: Sequence[nn.Parameter], stepped: Container[int]) -> list[str]:
    """Return warnings: of weights that no optimizer steps, and of those on which another Regularizer acts.

    One that was attached by itself (`automatic`) is detached instead.

    Args:
        names, weights: that are to be attached.
        stepped: ids of the weights that the optimizers hold.
    """
    if any(map(owners_of, weights)):
        gc.collect()  # an abandoned one is held by its own optimizer's hooks: a cycle that waits for the collector
    for owner in {id(owner): owner for weight in weights for owner in owners_of(weight)}.values():
        if owner.automatic:
            owner.detach(finished=False)
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
    return found


def some(names: Sequence[str]) -> str:
    """Return the first three."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
