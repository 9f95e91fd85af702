"""Use: one operator of a model, as far as it decides which kernels the model calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ggpass.kernels.cuda import variants
from ggpass.kernels.cuda.variants import Variant

#: Of activations that there are kernels for, and of what embedding and dequantize write.
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
ROW_DTYPES = {**DTYPES, torch.float32: "float32"}


@dataclass(frozen=True)
class Use:
    """How a model computes with a quantized weight.

    Attributes:
        family: "linear", "embedding" or "dequantize".
        dtype: of the activations, or of what comes out.
        k: columns of its codes.
    """

    family: str
    dtype: torch.dtype
    k: int


def variants_for(uses: Iterable[Use], decoder: str) -> list[Variant]:
    """Return every variant that these uses can call, for any number of rows; each once.

    A linear in float32 is dequantized and multiplied in torch; one in any wider dtype needs no kernel.
    """
    found: dict[str, Variant] = {}
    for use in uses:
        family = "dequantize" if use.family == "linear" and use.dtype not in DTYPES else use.family
        if use.dtype in ROW_DTYPES:
            for variant in _of(family, decoder, ROW_DTYPES[use.dtype], use.k):
                found.setdefault(variant.name, variant)
    return list(found.values())


def _of(family: str, decoder: str, dtype: str, k: int) -> tuple[Variant, ...]:
    if family == "linear":
        return variants.every_linear(decoder, dtype, k)
    return (variants.row_variant(family, decoder, dtype, k),)
