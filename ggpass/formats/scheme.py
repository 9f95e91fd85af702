"""Scheme: how a weight's scales are chosen; quantize: a weight to codes and scales, a block of rows at a time."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ggpass.errors import FormatError
from ggpass.formats.base import Format

#: Elements encoded at a time: the temporaries of one block stay near 1 MB.
BLOCK_ELEMENTS = 1 << 16

#: Scales stay normal float32 numbers, so that a kernel that flushes subnormals computes the same product.
MIN_SCALE_EXPONENT = -126


@dataclass(frozen=True)
class Scheme:
    """How a format is applied to a weight.

    Attributes:
        granularity: `channel` (one scale for each output channel, dimension 0) or `tensor`.
        scale: `pow2`: 2^ceil(log2(amax / format.amax)), never clips and keeps products exact; `real`:
            amax / format.amax; None: the format's own default.
        rounding: an encoder of the format: `nearest`, for rf8 also `paper`.
    """

    granularity: Literal["channel", "tensor"] = "channel"
    scale: Literal["pow2", "real"] | None = None
    rounding: str = "nearest"

    def __post_init__(self) -> None:
        if self.granularity not in ("channel", "tensor"):
            raise FormatError(f"granularity is 'channel' or 'tensor', not {self.granularity!r}")
        if self.scale not in ("pow2", "real", None):
            raise FormatError(f"scale is 'pow2', 'real' or None (the format's default), not {self.scale!r}")


@dataclass(frozen=True)
class Quantized:
    """w ≈ codebook[codes] · scale.

    Attributes:
        codes: (N, K) uint8, canonical.
        scale: (N,) or (1,) float32.
    """

    codes: Tensor
    scale: Tensor


def row_blocks(rows: int, columns: int) -> range:
    """Return the starts of blocks of rows of about BLOCK_ELEMENTS elements; the range's step is the rows of a block."""
    return range(0, rows, max(1, BLOCK_ELEMENTS // max(1, columns)))


def scale_of(amax: Tensor, fmt: Format, scheme: Scheme) -> Tensor:
    """scale = 2^ceil(log2(amax / format.amax)) (pow2) or amax / format.amax (real); 1 for an all-zero channel.

    Args:
        amax: (N,) float32 or wider, the largest magnitude of each channel; finite.

    Returns:
        (N,) float32.
    """
    # In float64 the quotient of two float32 numbers is exact enough that ceil(log2) can never land one too low.
    ratio = amax.double() / fmt.amax
    if (scheme.scale or fmt.default_scale) == "pow2":
        mantissa, exponent = torch.frexp(ratio)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(min=MIN_SCALE_EXPONENT)
        scale = torch.ldexp(torch.ones_like(ratio), exponent)
    else:
        scale = ratio.clamp(min=2.0**MIN_SCALE_EXPONENT)
    return torch.where(amax == 0, 1.0, scale).float()


def channel_amax(weight: Tensor) -> Tensor:
    """amax[n] = max_k |w[n, k]|, (N,) float32, in blocks of rows; NaN and infinity come through as they are."""
    rows, columns = weight.shape
    amax = torch.zeros(rows, dtype=torch.float32, device=weight.device)
    if columns:
        blocks = row_blocks(rows, columns)
        for start in blocks:
            block = weight[start : start + blocks.step]
            torch.maximum(block.amax(dim=1).float(), -block.amin(dim=1).float(), out=amax[start : start + blocks.step])
    return amax


def choose_scales(weight: Tensor, fmt: Format, scheme: Scheme) -> Tensor:
    """scale_of(channel_amax(weight)), (N,) or (1,) float32.

    Raises:
        FormatError: NaN or infinity in the weight, or weights beyond every power-of-two scale; names the channel.
    """
    amax = channel_amax(weight)
    if not torch.isfinite(amax).all():
        channel = (~torch.isfinite(amax)).nonzero().flatten().tolist()[0]
        raise FormatError(f"NaN or infinity in channel {channel} of {len(amax)}; repair or skip this weight")
    if scheme.granularity == "tensor":
        amax = amax.amax(dim=0, keepdim=True) if amax.numel() else amax.new_zeros(1)
    scale = scale_of(amax, fmt, scheme)
    if not torch.isfinite(scale).all():
        bad = int((~torch.isfinite(scale)).nonzero()[0])
        raise FormatError(
            f"channel {bad} of {len(amax)} reaches {amax[bad].item():.3g}: no power-of-two scale that float32 holds "
            "covers it; use scale='real', or skip this weight"
        )
    return scale


def quantize(weight: Tensor, fmt: Format, scheme: Scheme | None = None, out: Tensor | None = None) -> Quantized:
    """codes[n, k] = rounding(w[n, k] / scale[n]).

    Args:
        weight: (N, K) float32, bfloat16, float16 or float64, any strides; row n is output channel n.
        fmt: the format.
        scheme: how scales are chosen; the default is one for each channel.
        out: (N, K) uint8 to write the codes to (memory that a kernel likes); allocated if left out.

    Raises:
        FormatError: not a floating matrix, NaN or infinity in it, or weights beyond every power-of-two scale.
    """
    scheme = scheme or Scheme()
    if weight.dim() != 2 or not weight.is_floating_point():
        raise FormatError(
            f"quantize takes a floating (N, K) matrix, not {str(weight.dtype).removeprefix('torch.')} of shape "
            f"{tuple(weight.shape)}; flatten the dimensions behind the output channels first"
        )
    scale = choose_scales(weight, fmt, scheme)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device) if out is None else out
    blocks = row_blocks(*weight.shape)
    for start in blocks:
        rows = slice(start, start + blocks.step)
        divisor = scale[rows, None] if scheme.granularity == "channel" else scale
        codes[rows] = fmt.encode(weight[rows].float() / divisor, scheme.rounding)
    return Quantized(codes, scale)
