"""Inputs for the CUDA kernels, and what they must give: for the emulator and for a GPU alike."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ggpass.formats import FORMATS as ALL
from ggpass.formats import Format
from ggpass.kernels.cuda.uses import table_of
from ggpass.kernels.cuda.variants import DECODERS
from support.closeness import assert_rejects_corruption, assert_within, dot_bound

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: By decoder, the formats that it serves.
FORMATS: dict[str, tuple[Format, ...]] = {
    decoder: tuple(f for f in ALL.values() if table_of(f.codebook).decoder == decoder) for decoder in DECODERS
}


@dataclass(frozen=True)
class Linear:
    """One product: x (m, k), codes (n, k), scale (n,) or (1,), bias (n,) or None.

    Attributes:
        by_unit: whether weights are multiples of a unit that went into the scale, as operators take int8: then they
            are exact in every dtype, for one rounding of the scale and one of the codebook's value more.
    """

    format: Format
    x: Tensor
    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    by_unit: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """m, n, k."""
        return self.x.shape[0], self.codes.shape[0], self.codes.shape[1]

    @property
    def weights(self) -> Tensor:
        """(n, k) float64: codebook values, rounded to x's dtype where they are not exact in it."""
        values = self.format.codebook[self.codes.long()]
        return (values if self.by_unit else values.to(self.x.dtype)).double()

    @property
    def expected(self) -> Tensor:
        """(m, n) float64."""
        y = self.x.double() @ self.weights.T * self.scale.double()
        return y if self.bias is None else y + self.bias.double()

    def bound(self, *, chopped: bool) -> Tensor:
        """|y - expected| for sums in float32, in any order, and one rounding of y.

        A GPU's tensor cores shift the 17 terms of 16 products and a sum to the largest exponent and cut them off,
        so that each term brings at most a unit in the last place of the largest, 2u, where an addition that rounds
        brings u: 17 · 2u for 16 additions, 2.125 times the bound of `dot_bound` (Fasi, Higham, Mikaitis, Pranesh,
        Numerical behavior of NVIDIA tensor cores, 2021).
        """
        roundings = self.shape[2] + 3
        factor = (2.125 if chopped else 1) * (roundings + 2 * self.by_unit) / roundings
        accumulated = dot_bound(self.x, self.weights, self.scale, self.bias) * factor
        info = torch.finfo(self.x.dtype)
        # One rounding, to nearest; half a unit in the last place of a subnormal number is 2^-25 in float16.
        return accumulated + info.eps / 2 * (self.expected.abs() + accumulated + info.tiny)

    def check(self, y: Tensor, *, chopped: bool = False) -> None:
        """y is within the bound, and the bound would tell if it were not."""
        expected, bound = self.expected, self.bound(chopped=chopped)
        assert_within(y, expected, bound, f"y of {self.shape}")
        # A single weight may be zero, and then so is all of y.
        if y.numel() > 8 and self.codes.numel() > 8:
            assert_rejects_corruption(y, expected, bound)


def valid_codes(format: Format) -> Tensor:
    """Every code with a finite value, the aliases of zero and of a magnitude too."""
    return torch.arange(256)[torch.isfinite(format.codebook)].to(torch.uint8)


def random_codes(format: Format, *shape: int, canonical: bool = False) -> Tensor:
    """Codes of any value that the format has; `canonical` ones are what the operators take."""
    valid = valid_codes(format)
    codes = valid[torch.randint(len(valid), shape)]
    return format.canonicalize(codes) if canonical else codes


def random_linear(
    format: Format,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    *,
    one_scale: bool = False,
    bias: bool = True,
    canonical: bool = False,
) -> Linear:
    """Gaussian x; scales that bring the largest weight to a value between 1/2 and 3/2, as those of quantization do."""
    scale = (torch.rand(1 if one_scale else n) + 0.5) / format.amax
    shift = torch.randn(n) if bias else None
    return Linear(format, torch.randn(m, k).to(dtype), random_codes(format, n, k, canonical=canonical), scale, shift)


#: Widths that 16 codes divide, and others; no multiple of any step in either.
WIDTHS = {True: (16, 48, 64, 272, 1040, 2064), False: (1, 15, 33, 100, 271, 1041)}


def shapes(rows: int, columns: tuple[int, ...], aligned: bool) -> list[tuple[int, int, int]]:
    """(m, n, k) around a tile of `rows` rows of x: each m with each n, each with another k.

    Args:
        rows: of x in a block.
        columns: the values of n.
        aligned: whether 16 divides k.
    """
    ms = sorted({1, rows // 2 + 1, rows - 1, rows, rows + 1, 2 * rows + 3})
    pairs = [(m, n) for m in ms for n in columns]
    # Seven is prime to the number of widths and of columns, so that neighbours differ in everything.
    return [(m, n, WIDTHS[aligned][(i * 7 + i // len(columns)) % 6]) for i, (m, n) in enumerate(pairs)]


def linears(decoder: str, dtype: str, at: list[tuple[int, int, int]]) -> Iterator[Linear]:
    """A product for each shape; formats, one scale or many, bias or none in turn."""
    formats = FORMATS[decoder]
    for i, (m, n, k) in enumerate(at):
        yield random_linear(
            formats[i % len(formats)], DTYPES[dtype], m, n, k, one_scale=i % 3 == 0, bias=i // 2 % 2 == 0
        )
