"""The 8-bit formats. A new one is a file here and a name in the loop below; elsewhere, a call of `register`."""

from ggpass.formats.base import FORMATS, Format, Rounding, get_format, register
from ggpass.formats.e4m3 import E4M3
from ggpass.formats.int8 import INT8
from ggpass.formats.rf8 import RF8
from ggpass.formats.scheme import Quantized, Scheme, quantize

for _format in (RF8, E4M3, INT8):
    register(_format)

__all__ = [
    "E4M3",
    "FORMATS",
    "INT8",
    "RF8",
    "Format",
    "Quantized",
    "Rounding",
    "Scheme",
    "get_format",
    "quantize",
    "register",
]
