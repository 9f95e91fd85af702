"""INT8: value(c) = i/127, where i is the code read as a signed byte; −128 is never emitted."""

import torch

from ggpass.formats.base import Format, nearest_rounding

INT8_CODEBOOK = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.int8).float() / 127

INT8 = Format(
    name="int8",
    codebook=INT8_CODEBOOK,
    amax=1.0,
    roundings={"nearest": nearest_rounding(INT8_CODEBOOK, never_emitted={0x80})},
    default_scale="real",
)
