"""The 8-bit formats. A new one is a file here and a line in FORMATS."""

from ggpass.errors import FormatError
from ggpass.formats.base import Format, Rounding
from ggpass.formats.e4m3 import E4M3
from ggpass.formats.int8 import INT8
from ggpass.formats.rf8 import RF8
from ggpass.formats.scheme import Quantized, Scheme, quantize

FORMATS: dict[str, Format] = {f.name: f for f in (RF8, E4M3, INT8)}


def get_format(name: str) -> Format:
    """The format of that name.

    Raises:
        FormatError: no such format; the message lists those there are.
    """
    if name not in FORMATS:
        raise FormatError(f"there is no format {name!r}; choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


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
]
