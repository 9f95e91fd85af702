"""Which Regularizers act on a Parameter: two rates on one weight are told, or refused where one hides the other."""

import gc
import weakref
from collections.abc import Container, Iterable, Sequence
from typing import Any

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ggpass.errors import InputError

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


def _others(weights: Sequence[nn.Parameter]) -> list[list[Any]]:
    return [[owner for r in _ATTACHED.get(weight, []) if (owner := r()) is not None] for weight in weights]


def told_at_attach(
    names: Sequence[str], weights: Sequence[nn.Parameter], stepped: Container[int], coupled: bool
) -> list[str]:
    """What to warn of: weights that no optimizer steps, and weights on which another attached Regularizer acts.

    Args:
        names, weights: that are to be attached.
        stepped: ids of the weights that the optimizers hold.
        coupled: whether theirs is a coupled mode.

    Raises:
        InputError: both are in a coupled mode. A weight has one node in a graph, fed by one Regularizer: the other's
            rate would be lost in traced graphs and added in plain ones.
    """
    if any(_others(weights)):
        gc.collect()  # an abandoned one is held by its own optimizer's hooks: a cycle that waits for the collector
    held = [(name, owners) for name, owners in zip(names, _others(weights)) if owners]
    hidden = [name for name, owners in held if coupled and any(owner.coupled for owner in owners)]
    if hidden:
        raise InputError(
            f"{some(hidden)}: another attached Regularizer feeds the rate of these weights in a coupled mode, and a "
            "weight's node takes one; detach() it, skip= the shared weights in one of them, or use mode='proximal'"
        )
    told = []
    idle = [name for name, weight in zip(names, weights) if id(weight) not in stepped]
    if idle:
        told.append(
            f"{len(idle)} of {len(names)} weights are in none of the optimizers ({some(idle)}): they count in the "
            "bits, and the others make up for them; freeze them first, or skip= them"
        )
    if held:
        told.append(
            f"{some([name for name, _ in held])}: another Regularizer is attached to these weights, and the rate of "
            "both acts; detach() it, or skip= these weights in one"
        )
    return told


def some(names: Sequence[str]) -> str:
    """The first three."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
