"""INT8: value(c) = i/127, where i is the code read as a signed byte; −128 is never emitted."""

import torch

from ggpass.formats.base import Decoder, Format

CODEBOOK = torch.arange(256).to(torch.uint8).view(torch.int8).float() / 127

INT8 = Format(
    name="int8",
    codebook=CODEBOOK,
    default_scale="real",
    never_emitted=frozenset({0x80}),
    decoder=Decoder("linear", unit=CODEBOOK[1].item()),
)
