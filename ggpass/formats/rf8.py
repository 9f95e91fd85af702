"""RF8, the 8-bit residual float: w ≈ ±2^e1 ± 2^e2, a sum of two signed powers of two (arXiv 2506.00486).

Layout of a code, `s eeee rrr`: value = (−1)^s · 2^(e − 15) · (1 + RESIDUALS[rrr]) for e = 1…15, and 0 for e = 0.
"""

import math

import numpy as np
import torch

from ggpass.formats.base import Decoder, Format, Rounding, float32_at_most

#: r = ±2^(e2 − e1) for e1 − e2 ≤ 4, or 0 if the second power is left out. Ordered, so that codes are monotone.
RESIDUALS = (-1 / 4, -1 / 8, -1 / 16, 0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
BIAS = 15
MAX_EXPONENT = 15


def rf8_codebook() -> torch.Tensor:
    """value(s, e, r) = (−1)^s · 2^(e − 15) · (1 + RESIDUALS[r]), 0 at e = 0; (256,) float32, all exact."""
    magnitudes = [
        math.ldexp(1 + residual, e - BIAS) if e else 0.0 for e in range(MAX_EXPONENT + 1) for residual in RESIDUALS
    ]
    return torch.tensor(magnitudes + [-m if m else 0.0 for m in magnitudes], dtype=torch.float32)


def _paper_rounding() -> Rounding:
    """e1 = round(log2|w|), e2 = round(log2||w| − 2^e1|), w ≈ ±2^e1 ± 2^e2, the second if e1 − e2 ≤ 4.

    Rounding in the log domain switches exponents at odd powers of √2, and the residual's at 2^e1 ± 2^(j + 1/2): all
    irrational, so no float32 weight ever lies on one and the sums below in float64 decide every weight exactly.
    If the equations need e < 1 the result is 0 (SPEC); beyond the largest code it saturates.
    """
    bounds: list[float] = []
    codes: list[int] = [0]
    for e in range(1, MAX_EXPONENT + 2):
        one = math.ldexp(1.0, e - BIAS)
        # The upper edge of the interval below, and the code of the interval above it, in ascending magnitude.
        steps = (
            (math.sqrt(0.5), 0),
            (1 - 2**-2.5, 1),
            (1 - 2**-3.5, 2),
            (1 - 2**-4.5, 3),
            (1 + 2**-4.5, 4),
            (1 + 2**-3.5, 5),
            (1 + 2**-2.5, 6),
            (1 + 2**-1.5, 7),
        )
        for edge, residual in steps:
            if e > MAX_EXPONENT and residual > 0:
                break  # 2^1 · (1 − 1/4) = 1.5 is the largest magnitude
            bounds.append(one * edge)
            codes.append(8 * e + residual)
    lowest = {float(v): c for c, v in reversed(list(enumerate(RF8_CODEBOOK[:128].tolist())))}
    codes[-1] = lowest[1.5]  # needs e = 16; the lower code of the same number fits
    codes = [lowest[float(RF8_CODEBOOK[c])] for c in codes]
    positive = torch.tensor(codes, dtype=torch.uint8)
    return Rounding(
        thresholds=float32_at_most(np.array(bounds)),
        positive=positive,
        negative=torch.where(positive == 0, positive, positive | 0x80),
    )


RF8_CODEBOOK = rf8_codebook()

RF8 = Format(
    name="rf8",
    codebook=RF8_CODEBOOK,
    default_scale="pow2",
    decoder=Decoder("rf8"),
    roundings={"paper": _paper_rounding()},
)
