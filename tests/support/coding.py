"""encode: an array of symbols to the bytes of one container."""

from typing import Any

import numpy as np

from ggpass.packed.codec.encoder import encode_pieces


def encode(symbols: np.ndarray, method: Any = "auto", **options: Any) -> bytes:
    """Return the pieces of `encode_pieces` as one."""
    return b"".join(encode_pieces(symbols, method, **options))
