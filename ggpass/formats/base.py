"""Format: 256 values and pure functions between values and codes; it knows nothing of modules or devices.

The registry is here too, so that a format finds itself again by its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

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


def nearest_rounding(codebook: Tensor, emitted: Tensor) -> Rounding:
    """nearest(x) = argmin_c |x − codebook[c]| over the emitted codes, ties to the smaller magnitude.

    Args:
        codebook: (256,) float32.
        emitted: (n,) uint8, codes of different finite values; with each value its negative.
    """
    code_of = dict(zip(codebook[emitted.int()].tolist(), emitted.tolist()))
    magnitudes = np.array(sorted(value for value in code_of if value >= 0), dtype=np.float64)
    return Rounding(
        thresholds=float32_at_most((magnitudes[:-1] + magnitudes[1:]) / 2),
        positive=torch.tensor([code_of[m] for m in magnitudes.tolist()], dtype=torch.uint8),
        negative=torch.tensor([code_of[-m] for m in magnitudes.tolist()], dtype=torch.uint8),
    )


class Decoder(NamedTuple):
    """What kernels may assume of a codebook.

    Attributes:
        kind: `rf8`: bit arithmetic on RF8's canonical codes; `linear`: the code as a signed byte; `table`: nothing, so
            that each value is looked up.
        unit: the decoder's values times this are the codebook's. If it is not 1, to a relative 2^-23: kernels multiply
            the scale by it, and round once more than the codebook does.
    """

    kind: Literal["rf8", "linear", "table"]
    unit: float = 1.0


#: The decoder of any 256 values.
TABLE = Decoder("table")


@dataclass(frozen=True, eq=False)
class Format:
    """An 8-bit format: a codebook of 256 values, and the roundings that lead to it.

    Attributes:
        name: what a target string calls it, as in `rf8-cpu`; without a dash.
        codebook: (256,) float32, the value of each code before its channel's scale, symmetric in the emitted codes; NaN
            or infinity if a code means no number.
        default_scale: `pow2` or `real`, the rule used if a Scheme leaves it open.
        never_emitted: codes with a value that encoders do not produce all the same.
        decoder: what kernels may assume of the codebook.
        roundings: the encoders by name; `nearest` is added to those given.
        canonical: (256,) uint8, the lowest code of the same value.
        emitted: (n,) uint8, ascending: every code that an encoder may produce, so no alias, no code without a finite
            value, and none of `never_emitted`.
        amax: the largest magnitude of an emitted code; a channel's scale is chosen so that nothing exceeds it.
    """

    name: str
    codebook: Tensor
    default_scale: Literal["pow2", "real"]
    never_emitted: frozenset[int] = frozenset()
    decoder: Decoder = TABLE
    roundings: Mapping[str, Rounding] = field(default_factory=dict)
    canonical: Tensor = field(init=False, repr=False)
    emitted: Tensor = field(init=False, repr=False)
    amax: float = field(init=False)

    def __post_init__(self) -> None:
        values = self.codebook.tolist()
        # A NaN is found by its identity, as itself.
        canonical = torch.tensor([values.index(value) for value in values], dtype=torch.uint8)
        legal = torch.isfinite(self.codebook) & (canonical == torch.arange(256))
        legal[list(self.never_emitted)] = False
        emitted = legal.nonzero().flatten().to(torch.uint8)
        roundings = {"nearest": nearest_rounding(self.codebook, emitted), **self.roundings}
        amax = self.codebook[legal].abs().max().item()
        for name, value in {"canonical": canonical, "emitted": emitted, "roundings": roundings, "amax": amax}.items():
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        # A format is a constant: copies and other processes look it up by name instead of copying 256 values.
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
            FormatError: a code that means no number (NaN or infinity).
        """
        if not torch.isfinite(self.decode(codes)).all():
            raise FormatError(f"the codes hold a {self.name} code that means no number; the data is corrupt")
        return self.canonical.to(codes.device)[codes.int()]


#: Every format by its name; filled by `register`.
FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> Format:
    """Add a format to those that targets, files and the command line know, and return it.

    Raises:
        FormatError: another format of that name, or a name that a target string cannot hold.
    """
    if not fmt.name.isalnum() or FORMATS.setdefault(fmt.name, fmt) is not fmt:
        raise FormatError(f"{fmt.name!r} is taken or not made of letters and digits; give the format another name")
    return fmt


def get_format(name: str) -> Format:
    """Return the format of that name.

    Raises:
        FormatError: no such format; the message lists those there are.
    """
    if name not in FORMATS:
        raise FormatError(f"there is no format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


def decoder_of(codebook: Tensor) -> Decoder:
    """Return the decoder of the format with these 256 float32 values, `TABLE` if none has them; waits for a GPU."""
    bits = codebook.detach().cpu().float().view(torch.int32)
    return next((f.decoder for f in FORMATS.values() if torch.equal(f.codebook.view(torch.int32), bits)), TABLE)
