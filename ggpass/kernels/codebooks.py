"""Recognize a codebook once for each tensor: RF8, a multiple of the signed code, or any table."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from ggpass.formats.rf8 import RF8_CODEBOOK


class Codebook(NamedTuple):
    """`kind` names the decoder; the decoder's weights times `unit` are the codebook's."""

    kind: str
    unit: float


def classify(codebook: Tensor) -> Codebook:
    """The decoder for 256 float32 values."""
    if torch.equal(codebook, RF8_CODEBOOK):
        return Codebook("rf8", 1.0)
    unit = float(codebook[1])
    signed = torch.arange(256).to(torch.uint8).view(torch.int8).double()
    exact = signed * unit
    # Every value is the rounding of a multiple of one unit, as in int8; -128 is never emitted but decodes alike.
    close = (codebook.double() - exact).abs() <= exact.abs() * 2.0**-23
    if unit > 0 and bool(close.all()):
        return Codebook("linear", unit)
    return Codebook("table", 1.0)


class Codebooks:
    """The remembered answers; a tensor is not kept alive, and one changed in place is looked at again."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Codebook]] = {}

    def of(self, codebook: Tensor) -> Codebook:
        """`classify(codebook)`, remembered."""
        version = 0 if codebook.is_inference() else codebook._version
        known = self._known.get(id(codebook))
        if known is not None and known[0]() is codebook and known[1] == version:
            return known[2]
        answer, identity, memory = classify(codebook), id(codebook), self._known

        def forget(_: weakref.ref[Tensor]) -> None:
            memory.pop(identity, None)

        memory[identity] = (weakref.ref(codebook, forget), version, answer)
        return answer
