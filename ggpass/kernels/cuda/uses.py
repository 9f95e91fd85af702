"""What a model asks of the kernels: how its codebooks are decoded, and which variants its operators call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ggpass.formats.base import decoder_of
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


class Table(NamedTuple):
    """How a codebook is decoded.

    Attributes:
        decoder: "rf8", or "table" for any other.
        unit: factor of every scale, which makes the table's values small integers where the codebook allows that.
        table: the 256 float32 values to decode by, on the codebook's device; None for the codebook's own.
    """

    decoder: str
    unit: float
    table: Tensor | None


def table_of(codebook: Tensor) -> Table:
    """Return how the kernels decode a codebook; waits for the GPU.

    The integers from −128 to 127 are exact in bfloat16 and the multiples of 1/127 are not, so int8 is decoded to
    integers, and the unit goes into the scale.
    """
    kind, unit = decoder_of(codebook)
    if kind == "rf8":
        return Table("rf8", 1.0, None)
    if kind == "linear":
        integers = torch.arange(256, dtype=torch.uint8).view(torch.int8).float().to(codebook.device)
        return Table("table", unit, integers)
    return Table("table", 1.0, None)


def inexact(codebook: Tensor, dtype: torch.dtype) -> int:
    """Return how many of a codebook's values a kernel rounds because activations of `dtype` do not have them."""
    table = table_of(codebook)
    values = codebook if table.table is None else table.table
    values = values[torch.isfinite(values)]
    # For float16 the kernels hold RF8's values times a power of two, which brings all of them into its range.
    return 0 if table.decoder == "rf8" else int((values.to(dtype).float() != values).sum())
