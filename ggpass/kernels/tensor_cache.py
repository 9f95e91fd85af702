"""Remembered: what was worked out from a tensor, for as long as that tensor lives unchanged."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Made = TypeVar("Made")


class Remembered(Generic[Made]):
    """make(tensor), once for each tensor; none is kept alive, and one changed in place is looked at again."""

    def __init__(self, make: Callable[[Tensor], Made]) -> None:
        """Args:
        make: works it out; its result must not refer to the tensor.
        """
        self._make = make
        self._known: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], Made]] = {}

    def find(self, tensor: Tensor) -> Made | None:
        """What is remembered of this tensor; None where nothing is."""
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == _version(tensor):
            return known[2]
        return None

    def of(self, tensor: Tensor) -> Made:
        """`make(tensor)`, remembered."""
        found = self.find(tensor)
        if found is not None:
            return found
        made, identity, memory = self._make(tensor), id(tensor), self._known

        def forget(_: weakref.ref[Tensor]) -> None:
            memory.pop(identity, None)

        memory[identity] = (weakref.ref(tensor, forget), _version(tensor), made)
        return made


def _version(tensor: Tensor) -> tuple[int, int]:
    # `tensor.data = …` leaves the version as it is, and moves the data.
    return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()
