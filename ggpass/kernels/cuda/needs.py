"""Need: one operator of a model, as far as it decides which kernels the model calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ggpass.kernels.cuda import variants
from ggpass.kernels.cuda.kernels import DTYPES, row_variant
from ggpass.kernels.cuda.variants import Variant
from ggpass.kernels.unavailable import KernelsUnavailable


@dataclass(frozen=True)
class Need:
    """What a lowered weight is used for.

    Attributes:
        family: "linear", "embedding" or "dequantize".
        dtype: of the activations, or of what comes out.
        k: columns of its codes.
    """

    family: str
    dtype: torch.dtype
    k: int


def variants_for(needs: Iterable[Need], decoder: str) -> list[Variant]:
    """Every variant that these uses can call, for any number of rows; each once.

    A use in a dtype without kernels needs none.
    """
    found: dict[str, Variant] = {}
    for need in needs:
        dtype = DTYPES.get(need.dtype)
        if dtype is None:
            continue
        for variant in _of(need.family, decoder, dtype, need.k):
            found.setdefault(variant.name, variant)
    return list(found.values())


def _of(family: str, decoder: str, dtype: str, k: int) -> tuple[Variant, ...]:
    if family == "linear":
        return variants.every_linear(decoder, dtype, k)
    try:
        return (row_variant(family, decoder, dtype, k),)
    except KernelsUnavailable:
        return ()
