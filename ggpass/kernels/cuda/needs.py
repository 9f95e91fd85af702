"""Need: one operator of a model, as far as it decides which kernels the model calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ggpass.kernels.cuda import variants
from ggpass.kernels.cuda.variants import Variant
from ggpass.kernels.unavailable import KernelsUnavailable

#: Of activations that there are kernels for.
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


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


def row_variant(family: str, decoder: str, dtype: str, k: int) -> Variant:
    """The variant for "embedding" or "dequantize".

    Raises:
        KernelsUnavailable: there is none.
    """
    find: Callable[..., Variant] | None = getattr(variants, "row_variant", None)
    if find is None:
        raise KernelsUnavailable(f"there is no CUDA kernel for {family} in this version; update ggpass")
    return find(family, decoder, dtype, k)
