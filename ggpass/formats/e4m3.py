"""E4M3: the 256 values of float8_e4m3fn, (−1)^s · 2^(e − 7) · (1 + m/8), subnormal at e = 0, NaN at 0x7f and 0xff."""

import torch

from ggpass.formats.base import Format

E4M3 = Format(
    name="e4m3",
    codebook=torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float(),
    default_scale="real",
)
