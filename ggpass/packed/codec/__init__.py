"""codec: lossless coding of integer symbols of any range, at their entropy.

Two coders. `exp-golomb` is the structured prefix code the literature uses for generalized-Gaussian weights. `rans` is
an interleaved range asymmetric numeral system with one static table for each array: it reaches the zero-order entropy
from 0.05 bits a symbol up, where every one-symbol prefix code wastes what lies below one bit.
"""

from ggpass.packed.codec.decoder import Decoder, decode
from ggpass.packed.codec.encoder import Method, encode, encode_pieces
from ggpass.packed.codec.histogram import histogram
from ggpass.packed.codec.native import crc32c
from ggpass.packed.codec.planes import decode_planes, encode_planes, merge_planes, merge_tasks, split_planes
from ggpass.packed.codec.threads import run_all

__all__ = [
    "Decoder",
    "Method",
    "crc32c",
    "decode",
    "decode_planes",
    "encode",
    "encode_pieces",
    "encode_planes",
    "histogram",
    "merge_planes",
    "merge_tasks",
    "run_all",
    "split_planes",
]
