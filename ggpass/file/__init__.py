"""file: a model as one safe file, every weight at its entropy; and that file back as tensors or as a model."""

from ggpass.file.convert import Packed, PackReport
from ggpass.file.directory import pack, unpack
from ggpass.file.methods import Codes, Grid, Lossless, Method, parse_method
from ggpass.file.reader import PackedFile

__all__ = [
    "Codes",
    "Grid",
    "Lossless",
    "Method",
    "PackReport",
    "Packed",
    "PackedFile",
    "pack",
    "parse_method",
    "unpack",
]
