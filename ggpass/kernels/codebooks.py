"""Recognize a codebook once for each tensor: RF8, a multiple of the signed code, or any table."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ggpass.formats.rf8 import RF8_CODEBOOK
from ggpass.kernels.tensor_cache import Remembered


class Codebook(NamedTuple):
    """`kind` names the decoder; the decoder's weights times `unit` are the codebook's."""

    kind: str
    unit: float


def classify(codebook: Tensor) -> Codebook:
    """The decoder for 256 float32 values; on a GPU this waits for it."""
    codebook = codebook.cpu()
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


class Codebooks(Remembered[Codebook]):
    """The remembered answers."""

    def __init__(self) -> None:
        super().__init__(classify)
