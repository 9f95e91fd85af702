"""E5M2, a format for the tests alone: the 256 values of float8_e5m2; its infinities and NaNs are never emitted.

The one file that a new format takes. `conftest.py` imports it, and every test that goes through the formats meets it.
"""

import torch

from ggpass.formats import Format, register

E5M2 = register(
    Format(
        name="e5m2",
        codebook=torch.arange(256).to(torch.uint8).view(torch.float8_e5m2).float(),
        default_scale="real",
    )
)
