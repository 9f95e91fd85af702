"""Format: 256 values and pure functions between values and codes; it knows nothing of modules or devices."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ggpass.errors import FormatError


@dataclass(frozen=True, eq=False)
class Rounding:
    """code(x) = codes_of_sign(x)[ #{t in thresholds : t < |x|} ]: a monotone map from magnitudes to codes.

    Attributes:
        thresholds: (n,) float32, ascending. They are the exact decision points rounded *down* to float32: for every
            float32 magnitude `v`, `v > threshold` then decides exactly as the real-valued comparison would, and a
            magnitude on a decision point goes to the smaller value.
        positive: (n + 1,) uint8, the code of each interval for x >= 0.
        negative: (n + 1,) uint8, the same for x < 0.
    """

    thresholds: Tensor
    positive: Tensor
    negative: Tensor


def float32_at_most(exact: np.ndarray) -> Tensor:
    """t = max{f in float32 : f <= exact}, elementwise; float64 in, (n,) float32 out."""
    rounded = exact.astype(np.float32)
    too_high = rounded.astype(np.float64) > exact
    rounded[too_high] = np.nextafter(rounded[too_high], np.float32(-np.inf))
    return torch.from_numpy(rounded)


def canonical_codes(codebook: Tensor) -> Tensor:
    """canonical(c) = min{d : codebook[d] = codebook[c]}, (256,) uint8; a NaN code is its own canonical code."""
    values = codebook.tolist()
    return torch.tensor(
        [next((d for d in range(c) if values[d] == values[c]), c) for c in range(256)], dtype=torch.uint8
    )


def nearest_rounding(codebook: Tensor, never_emitted: Collection[int] = ()) -> Rounding:
    """nearest(x) = argmin_c |x − codebook[c]|, ties to the smaller magnitude, equal values to the lower code.

    Args:
        codebook: (256,) float32, symmetric up to `never_emitted`; NaN entries are never emitted either.
        never_emitted: codes an encoder must not produce.
    """
    lowest: dict[float, int] = {}
    for code, value in enumerate(codebook.tolist()):
        if code not in never_emitted and value == value:
            lowest.setdefault(value + 0.0, code)  # + 0.0 folds −0 into 0
    magnitudes = np.array(sorted(v for v in lowest if v >= 0), dtype=np.float64)
    return Rounding(
        thresholds=float32_at_most((magnitudes[:-1] + magnitudes[1:]) / 2),
        positive=torch.tensor([lowest[m] for m in magnitudes.tolist()], dtype=torch.uint8),
        negative=torch.tensor([lowest[-m + 0.0] for m in magnitudes.tolist()], dtype=torch.uint8),
    )


@dataclass(frozen=True, eq=False)
class Format:
    """An 8-bit format: a codebook of 256 values, and the roundings that lead to it.

    Attributes:
        name: what a target string calls it, as in `rf8-cpu`.
        codebook: (256,) float32, the value of each code before its channel's scale; NaN where a code is illegal.
        amax: the largest magnitude an encoder emits; a channel's scale is chosen so that nothing exceeds it.
        roundings: the encoders by name; every format has `nearest`.
        default_scale: `pow2` or `real`, the rule used where a Scheme leaves it open.
    """

    name: str
    codebook: Tensor
    amax: float
    roundings: Mapping[str, Rounding]
    default_scale: str
    canonical: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "canonical", canonical_codes(self.codebook))

    def __reduce__(self) -> tuple[object, tuple[str]]:
        # A format is a constant: copies and other processes look it up by name instead of copying 256 values.
        from ggpass.formats import get_format

        return get_format, (self.name,)

    def __deepcopy__(self, memo: dict[int, object]) -> "Format":
        return self

    def encode(self, values: Tensor, rounding: str = "nearest") -> Tensor:
        """codes[i] = rounding(values[i]); values already divided by their scale.

        Args:
            values: any shape, floating; computed in float32.
            rounding: one of `self.roundings`.

        Returns:
            uint8, the shape of `values`, canonical codes only. Magnitudes beyond `amax` saturate.

        Raises:
            FormatError: an unknown rounding, or NaN or infinity among the values.
        """
        if rounding not in self.roundings:
            raise FormatError(
                f"{self.name} has no rounding {rounding!r}; choose one of {', '.join(sorted(self.roundings))}"
            )
        values = values.to(torch.float32)
        if not torch.isfinite(values).all():
            raise FormatError(f"{self.name} cannot encode NaN or infinity; repair the values first")
        table = self.roundings[rounding]
        device = values.device
        # int32 throughout: indices widened to int64 would be the largest temporaries of a block.
        interval = torch.bucketize(values.abs().contiguous(), table.thresholds.to(device), out_int32=True)
        interval.add_((values < 0).int(), alpha=len(table.positive))
        codes = torch.cat([table.positive, table.negative]).to(device)
        return codes.index_select(0, interval.flatten()).view(values.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """values[i] = codebook[codes[i]]; uint8 of any shape in, float32 of the same shape out."""
        return self.codebook.to(codes.device)[codes.int()]

    def canonicalize(self, codes: Tensor) -> Tensor:
        """codes'[i] = min{d : codebook[d] = codebook[codes[i]]}: what every loader does to codes from outside.

        Raises:
            FormatError: a code that means no number (the NaN codes of e4m3).
        """
        if not torch.isfinite(self.decode(codes)).all():
            raise FormatError(f"the codes hold a {self.name} code that means no number; the data is corrupt")
        return self.canonical.to(codes.device)[codes.int()]
