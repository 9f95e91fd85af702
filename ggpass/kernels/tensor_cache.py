"""TensorCache: values computed from tensors, each kept for as long as its tensor lives unchanged."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import Tensor

Value = TypeVar("Value")


class TensorCache(Generic[Value]):
    """compute(tensor), once for each tensor; none is kept alive, and one changed in place is computed anew."""

    def __init__(self, compute: Callable[[Tensor], Value]) -> None:
        """Args:
        compute: the function; its result must not refer to the tensor.
        """
        self._compute = compute
        self._entries: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], Value]] = {}

    def find(self, tensor: Tensor) -> Value | None:
        """Return the cached value of this tensor; None if there is none."""
        entry = self._entries.get(id(tensor))
        if entry is not None and entry[0]() is tensor and entry[1] == _version(tensor):
            return entry[2]
        return None

    def of(self, tensor: Tensor) -> Value:
        """Return `compute(tensor)`, from the cache if it is there."""
        found = self.find(tensor)
        if found is not None:
            return found
        value, identity, entries = self._compute(tensor), id(tensor), self._entries

        def forget(_: weakref.ref[Tensor]) -> None:
            entries.pop(identity, None)

        entries[identity] = (weakref.ref(tensor, forget), _version(tensor), value)
        return value


def _version(tensor: Tensor) -> tuple[int, int]:
    # `tensor.data = …` leaves the version as it is, and moves the data.
    return (0 if tensor.is_inference() else tensor._version), tensor.data_ptr()
